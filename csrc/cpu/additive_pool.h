// The softmax pooling kernels as the torch side sees them.
#pragma once
#include "row_norm.h"

namespace hbert {

constexpr int64_t kMaxPoolHeads = 64;

// score[t, j] = scale x_t . scorer_j; alpha = softmax over the rows of a sequence; pooled_j = sum_t alpha[t, j] x_t. Tables of
// vectors, one per head, have rows of the whole width or of the head's own slice of x.
struct PoolProblem {
  int64_t width, heads, head_dim;
  bool dense_scorer;  // scorer rows: width, otherwise head_dim
  bool full_output;   // pooled rows: width, otherwise head_dim
  double scale;
  DType x_dtype;
  const void* x;          // [rows, width], x_dtype
  const void* scorer;     // [(sequences,) heads, row], compute type
  int64_t scorer_stride;  // values between the scorers of two sequences; 0: one for all
};

// A chunk's share of a sequence's pooling, or all of it, in the compute type.
struct PoolPart {
  void* max;     // [heads]
  void* sum;     // [heads], of exp(score - max)
  void* pooled;  // [heads, row], sum of exp(score - max) x
};

struct PoolGradient {
  const void* softmax;  // [sequences, 2, heads]: the largest score, and the sum of exp(score - largest)
  const void* pooled;   // [sequences, heads, row]
  const void* dpooled;  // [sequences, heads, row]
  void* dx;             // [rows, width], x_dtype
  bool accumulate;      // add to dx
};

// y_t = x_t o gate_s; backward: y is the gradient of x, dy o gate.
struct GateProblem {
  int64_t width;
  DType x_dtype;
  const void* x;     // [rows, width], x_dtype
  const void* dy;    // [rows, width], x_dtype; backward only
  const void* gate;  // [sequences, width], compute type
  void* y;           // [rows, width], x_dtype
};

struct PoolKernels {
  void (*forward)(const PoolProblem&, RowRange, PoolPart);
  // Merges `count` parts in order, part p at offset p stride (in values) of the given pointers, into one sequence's results.
  void (*merge)(const PoolProblem&, PoolPart parts, int64_t stride, int64_t count, void* pooled, void* softmax);
  // Adds the chunk's share of the gradient of the scorer to dscorer, [heads, row].
  void (*backward)(const PoolProblem&, const PoolGradient&, RowRange, void* dscorer);
  void (*gate)(const GateProblem&, RowRange);
  // Adds the chunk's share of the gradient of the gate to dgate, [width].
  void (*gate_backward)(const GateProblem&, RowRange, void* dgate);
};

#define HBERT_DECLARE(level)      \
  namespace level {               \
  extern const PoolKernels kPool; \
  }
HBERT_FOR_CODE_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
