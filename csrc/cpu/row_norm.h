// The row normalization kernels as the torch side sees them: plain structs, raw pointers, one table of functions per
// instruction set level. Included by both sides, so it holds neither torch nor inline code.
#pragma once
#include "level.h"

namespace hbert {

// What is normalized in row t of sequence s.
enum class RowSource : int32_t {
  kPlain,       // x_t
  kResidual,    // x_t + residual_t, stored as total_t and normalized as stored
  kActivation,  // act(x_t + input_bias)
  kGated,       // x_t o gate_s
};

enum class Activation : int32_t { kGelu, kGeluTanh, kRelu };

// Rows quantised one by one: values scale is the row. Nothing is quantised where the pointers are null.
struct Int8Rows {
  int8_t* values;  // [rows, width]
  float* scale;    // [rows]
};

// Parameters, gates and statistics are in the compute type: double for float64 inputs, float otherwise.
struct RowNormForward {
  RowSource source;
  Activation activation;
  bool skip_norm;  // the rows of the source go out as they are
  int64_t width;
  double eps;
  DType x_dtype, residual_dtype;
  const void* x;           // [rows, width], x_dtype
  const void* residual;    // [rows, width], residual_dtype
  void* total;             // [rows, width], the wider of both
  const void* input_bias;  // [width]
  const void* gate;        // [sequences, width]
  const void* weight;      // [width]
  const void* bias;        // [width]
  void* y;                 // [rows, width], x_dtype; may be null beside values
  Int8Rows int8;           // not of float64
  void* mean;              // [rows], or null
  void* rstd;              // [rows], or null
};

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + dtotal with g = dy weight, carried through the source to x.
struct RowNormBackward {
  RowSource source;
  Activation activation;
  int64_t width;
  DType x_dtype, dy_dtype;  // x is the total if there was a residual
  const void* dy;           // [rows, width], dy_dtype
  const void* dtotal;       // [rows, width], x_dtype, or null
  const void* x;            // [rows, width], x_dtype
  const void* input_bias;   // [width]
  const void* gate;         // [sequences, width]
  const void* mean;         // [rows]
  const void* rstd;         // [rows]
  const void* weight;       // [width]
  void* dx;                 // [rows, width], x_dtype
};

// Sums over rows that a backward kernel adds to, each [width] in the compute type.
struct RowNormSums {
  void* dweight;  // of dy xhat
  void* dbias;    // of dy
  void* dsource;  // of what reaches input_bias or gate; unused by the other sources
};

// Layer norm, then a depthwise convolution of `taps` (odd) taps with a residual: out_t = Y_t + sum_j conv_j o Y_{t+j}.
struct ConvNormForward {
  int64_t width, taps;
  double eps;
  DType x_dtype;
  const void* x;            // [rows, width], x_dtype
  const void* weight;       // [width]
  const void* bias;         // [width]
  const void* conv_weight;  // [taps, width], the residual's 1 added to the middle tap
  void* y;                  // [rows, width], x_dtype; may be null beside values
  Int8Rows int8;            // not of float64
  void* mean;               // [rows], or null
  void* rstd;               // [rows], or null
};

struct ConvNormBackward {
  int64_t width, taps;
  DType x_dtype;
  const void* dy;           // [rows, width], x_dtype
  const void* x;            // [rows, width], x_dtype
  const void* mean;         // [rows]
  const void* rstd;         // [rows]
  const void* weight;       // [width]
  const void* bias;         // [width]
  const void* conv_weight;  // as in forward
  void* dx;                 // [rows, width], x_dtype
};

struct RowRange {
  int64_t begin, end;  // rows
  int64_t sequence;    // the sequence they lie in, and its rows
  int64_t first_row, end_row;
};

struct RowNormKernels {
  // Scratch: that many values of the compute type per call, aligned to 64 bytes.
  void (*forward)(const RowNormForward&, RowRange, void* scratch);                 // 2 width
  void (*backward)(const RowNormBackward&, RowRange, RowNormSums, void* scratch);  // 2 width
};

struct ConvNormKernels {
  void (*forward)(const ConvNormForward&, RowRange, void* scratch);                 // (taps + 1) width
  void (*backward)(const ConvNormBackward&, RowRange, RowNormSums, void* scratch);  // width; dsource: [taps, width]
};

#define HBERT_DECLARE(level)              \
  namespace level {                       \
  extern const RowNormKernels kRowNorm;   \
  extern const ConvNormKernels kConvNorm; \
  }
HBERT_FOR_CODE_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
