// The linear layer with a packed float32 weight as the torch side sees it.
#pragma once
#include "row_norm.h"

namespace hbert {

// out[t, n] = act(sum_k x[t, k] w[n, k] + bias[n]) + other[t, n]
struct PackedLinear {
  int64_t width, columns;  // K, N
  bool activated;
  Activation activation;
  const float* x;       // [rows, width]
  const float* weight;  // [panels, width, panel]: w[n, k] with n = panel (index) + ..
  const float* bias;    // [columns], or null
  const float* other;   // [rows, columns], or null
  float* out;           // [rows, columns]
};

struct PackedLinearKernels {
  int64_t panel;  // the layout of the weight at this level: columns side by side

  // rows: [end - begin, width], in an order of its own.
  void (*pack)(const PackedLinear&, int64_t begin, int64_t end, float* rows);
  // Rows [begin, end), which pack has left in `rows`, times the columns [column, column + columns), from a whole panel on.
  // sums: [end - begin, panel], scratch.
  void (*multiply)(const PackedLinear&, int64_t begin, int64_t end, int64_t column, int64_t columns, const float* rows,
                   float* sums);
};

#define HBERT_DECLARE(level)                      \
  namespace level {                               \
  extern const PackedLinearKernels kPackedLinear; \
  }
HBERT_FOR_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
