// The self-attention kernels as the torch side sees them. Included by both sides, so it holds neither torch nor inline
// code.
#pragma once
#include <stddef.h>

#include "level.h"

namespace hbert {

// One head of one sequence, rows [first, first + length) of the packed tokens, and some of its queries.
struct AttentionTask {
  int64_t head, first, length;
  int64_t query_begin, query_end;  // within the sequence
};

// out = softmax(scale Q K^T) V for each head; log_sum_exp is that of the scaled scores.
struct AttentionForward {
  int64_t num_tokens, num_heads, head_size;
  double scale;
  DType dtype;
  const void* qkv;    // [num_tokens, 3, num_heads, head_size], dtype
  void* out;          // [num_tokens, num_heads, head_size], dtype
  void* log_sum_exp;  // [num_heads, num_tokens], compute type: double for float64, float otherwise
};

// With P = exp(scale Q K^T - log_sum_exp) and delta = rowsum(dout o out): dV = P^T dout,
// dS = P o (dout V^T - delta), dQ = scale dS K, dK = scale dS^T Q.
struct AttentionBackward {
  int64_t num_tokens, num_heads, head_size;
  double scale;
  DType dtype;
  const void* dout;  // as out
  const void* qkv;
  const void* out;
  const void* log_sum_exp;
  void* dqkv;  // as qkv
};

struct AttentionKernels {
  // Bytes of scratch memory (aligned to 64) that `forward` needs for sequences of up to max_length tokens.
  size_t (*forward_scratch)(const AttentionForward&, int64_t max_length);
  // Tasks [0, count). Neighbouring tasks of the same head and sequence share one repacking of its keys and values.
  void (*forward)(const AttentionForward&, const AttentionTask* tasks, int64_t count, void* scratch);
};

struct AttentionBackwardKernels {
  size_t (*backward_scratch)(const AttentionBackward&, int64_t max_length);
  // Tasks [0, count), each of which holds all queries of its sequence.
  void (*backward)(const AttentionBackward&, const AttentionTask* tasks, int64_t count, void* scratch);
};

#define HBERT_DECLARE(level)                                \
  namespace level {                                         \
  extern const AttentionKernels kAttention;                 \
  extern const AttentionBackwardKernels kAttentionBackward; \
  }
HBERT_FOR_CODE_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
