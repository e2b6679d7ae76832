// The row normalization kernels as the torch side sees them: plain structs, raw pointers, one table of functions per
// instruction set level. Included by both sides, so it holds neither torch nor inline code.
#pragma once
#include "level.h"

namespace hbert {

// y = LN(x), or with a residual: total = x + residual, y = LN(total) of the stored total.
// Parameters and statistics are in the compute type: double for float64 inputs, float otherwise.
struct LayerNormForward {
  int64_t width;
  double eps;
  DType x_dtype, residual_dtype, total_dtype;
  const void* x;         // [rows, width], x_dtype
  const void* residual;  // [rows, width], residual_dtype; null: plain layer norm
  void* total;           // [rows, width], total_dtype; written if there is a residual
  void* y;               // [rows, width], x_dtype
  const void* weight;    // [width], compute type
  const void* bias;      // [width], compute type
  void* mean;            // [rows], compute type
  void* rstd;            // [rows], compute type
};

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + dtotal, g = dy weight.
struct LayerNormBackward {
  int64_t width;
  DType x_dtype, dy_dtype;
  const void* dy;      // [rows, width], dy_dtype
  const void* dtotal;  // [rows, width], x_dtype, or null
  const void* x;       // [rows, width], x_dtype
  const void* mean;    // [rows], compute type
  const void* rstd;    // [rows], compute type
  const void* weight;  // [width], compute type
  void* dx;            // [rows, width], x_dtype
};

struct RowNormKernels {
  // Rows [begin, end) of the problem.
  void (*layer_norm_forward)(const LayerNormForward&, int64_t begin, int64_t end);
  // Rows [begin, end); their sums of dy xhat and dy overwrite dweight and dbias, [width] in the compute type.
  void (*layer_norm_backward)(const LayerNormBackward&, int64_t begin, int64_t end, void* dweight, void* dbias);
};

#define HBERT_DECLARE(level) namespace level { extern const RowNormKernels kRowNorm; }
HBERT_FOR_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
