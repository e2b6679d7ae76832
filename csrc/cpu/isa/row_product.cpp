// Product of some rows with a matrix as it lies in memory, compiled once per instruction set level (HBERT_LEVEL). No torch,
// no standard library.
#include "../row_product.h"

#include "matmul.h"

namespace {

using hbert::RowProduct;
using Dot = Plain<Vec>;

constexpr int kPanel = kLanes<Vec>;

int64_t rows_size(const RowProduct& a, int64_t rows) { return round_up(rows, kTileRows) * row_units<Dot>(a.width); }

int64_t scratch_size(const RowProduct& a, int64_t rows, int64_t columns) {
  return panels_size<Dot>(columns, a.width) + round_up(rows, kTileRows) * kPanel;
}

void pack(const RowProduct& a, int64_t begin, int64_t end, float* rows) {
  const int64_t units = row_units<Dot>(a.width);
  pack_rows<Dot>(a.x + begin * a.width, a.width, end - begin, a.width, rows);
  // Of the last tile.
  fill(rows + (end - begin) * units, (round_up(end - begin, kTileRows) - (end - begin)) * units, 0.0f);
}

void multiply(const RowProduct& a, int64_t begin, int64_t end, int64_t column, int64_t columns, const float* rows,
              float* scratch) {
  float *panels = scratch, *sums = scratch + panels_size<Dot>(columns, a.width);
  pack_panels<Dot>(a.b + column, a.columns, a.width, columns, panels);
  for (int64_t c = 0; c < columns; c += kPanel) {
    const int64_t count = smaller(kPanel, columns - c);
    multiply_panel<Dot>(rows, row_units<Dot>(a.width), end - begin, panels + c * a.width, count, a.width,
                        [&](const auto& tile, int64_t row) { tile.store(sums + row * kPanel, kPanel); });
    for (int64_t row = begin; row < end; ++row)
      for_each<Vec>(count, [&](int64_t i, auto part) {
        Vec::store(a.out + row * a.columns + column + c + i, Vec::load(sums + (row - begin) * kPanel + i, part), part);
      });
  }
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const RowProductKernels kRowProduct = {rows_size, scratch_size, pack, multiply};
}
}  // namespace hbert
