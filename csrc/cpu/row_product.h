// The product of some rows with a matrix as it lies in memory, as the torch side sees it.
#pragma once
#include "level.h"

namespace hbert {

// out = x b
struct RowProduct {
  int64_t width, columns;
  const float* x;  // [rows, width]
  const float* b;  // [width, columns]
  float* out;      // [rows, columns]
};

struct RowProductKernels {
  // Floats that pack needs for so many rows, and multiply for these and so many columns.
  int64_t (*rows_size)(const RowProduct&, int64_t rows);
  int64_t (*scratch_size)(const RowProduct&, int64_t rows, int64_t columns);
  // Rows [begin, end) of x, for multiply.
  void (*pack)(const RowProduct&, int64_t begin, int64_t end, float* rows);
  // Rows [begin, end), which pack has left in `rows`, times the columns [column, column + columns), from a whole panel on.
  void (*multiply)(const RowProduct&, int64_t begin, int64_t end, int64_t column, int64_t columns, const float* rows,
                   float* scratch);
};

#define HBERT_DECLARE(level)                  \
  namespace level {                           \
  extern const RowProductKernels kRowProduct; \
  }
HBERT_FOR_CODE_LEVELS(HBERT_DECLARE)
#undef HBERT_DECLARE

}  // namespace hbert
