// The row kernels of the masked-language-model loss as the torch side sees them.
#pragma once
#include "level.h"

namespace hbert {

// Per row, with s = logits + bias and p = softmax(s):
//   loss = sum_j q_j (log sum exp(s) - s_j), q = (1 - label_smoothing) [j = label] + label_smoothing / vocab
// and, if wanted, scale (p - q) written over the logits.
struct SoftmaxCrossEntropy {
  int64_t vocab, stride;  // elements per row, elements from one row to the next
  DType dtype;            // of logits; bias and loss are in the compute type
  double label_smoothing, scale;
  bool gradient;
  void* logits;           // [rows, vocab]
  const void* bias;       // [vocab], or null
  const int64_t* labels;  // [rows], each in [0, vocab)
  void* loss;             // [rows]
  int64_t* correct;       // [rows], 1 where the first of the largest logits is the label's, otherwise 0
};

// sum += term; a bfloat16 sum keeps what rounding takes off it in the remainder, which is added back the next time.
struct Accumulate {
  DType sum_dtype, term_dtype;  // kFloat32 or kBFloat16
  void* sum;
  void* remainder;  // bfloat16; used if sum is
  const void* term;
};

struct MaskedLmLossKernels {
  // Rows [begin, end). scratch: [vocab] in the compute type, of the calling thread.
  void (*softmax_cross_entropy)(const SoftmaxCrossEntropy&, int64_t begin, int64_t end, void* scratch);
  // Elements [begin, end).
  void (*accumulate)(const Accumulate&, int64_t begin, int64_t end);
};

#define HBERT_DECLARE(level)                      \
  namespace level {                               \
  extern const MaskedLmLossKernels kMaskedLmLoss; \
  }
HBERT_FOR_CODE_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
