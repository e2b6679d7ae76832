// How a block of rows passes by the panels of a packed weight where there is AMX: what packed_linear and int8_linear share.
#pragma once
#include "amx.h"
#include "matmul.h"

namespace {

// Columns of a panel, two registers; bytes of its 32-bit sums, and of a step of the inner dimension, too.
constexpr int kRegisterPanel = 32, kPanelBytes = 4 * kRegisterPanel;
// Steps of a panel that stay in the first cache while the rows pass by.
constexpr int64_t kBlockSteps = 8;

// Rows of a task: they stay in the second cache, and what is read of the weight for one block of them is read again for the
// next, which with fewer takes longer than the products.
inline int64_t rows_in_cache(int64_t row_bytes) { return smaller(512, (768 << 10) / row_bytes + kRegisterRows); }

// Rows [begin, end) of x, whole registers wide: where they are, or in `space`, filled up with zeros.
template <class T>
const void* rows_for_registers(const T* x, int64_t width, int64_t begin, int64_t end, void* space) {
  const int64_t padded = round_up(width, kRegisterBytes / static_cast<int64_t>(sizeof(T)));
  x += begin * width;
  if (padded == width) return x;
  T* to = static_cast<T*>(space);
  for (int64_t row = begin; row < end; ++row, x += width, to += padded) {
    for (int64_t k = 0; k < width; ++k) to[k] = x[k];
    for (int64_t k = width; k < padded; ++k) to[k] = T{};
  }
  return space;
}

// Rows by registers of `size`, of which the last one begins early, so that it is whole, too.
struct RegisterRows {
  int64_t rows, size, count;
  explicit RegisterRows(int64_t num_rows)
      : rows(num_rows), size(smaller(num_rows, kRegisterRows)), count((num_rows + kRegisterRows - 1) / kRegisterRows) {}
  int64_t first(int64_t i) const { return smaller(i * kRegisterRows, rows - size); }
};

// Rows times a panel. sums: scratch, [registers of rows, 16, panel]. While the rows pass by a block of steps, the next one,
// which lies behind it, is fetched. finish(first row, last row, their sums) as soon as they are done.
template <class D, class F>
inline void multiply_panel_by_registers(const RegisterRows& parts, const char* rows, int64_t row_bytes,
                                        const char* panel, char* sums, F finish) {
  constexpr int64_t kStepBytes = kRegisterRows * kPanelBytes, kSumBytes = kRegisterRows * kPanelBytes;
  const int64_t all_steps = row_bytes / kRegisterBytes, pairs = (parts.count + 1) / 2;
  const int64_t lines = (kStepBytes / 64 + pairs - 1) / pairs;
  for (int64_t step = 0; step < all_steps; step += kBlockSteps) {
    const int64_t steps = smaller(kBlockSteps, all_steps - step);
    const char *here = rows + step * kRegisterBytes, *columns = panel + step * kStepBytes;
    const char* fetch = columns + steps * kStepBytes;
    for (int64_t i = 0; i < parts.count; i += 2, fetch += steps * lines * 64) {
      const int64_t count = smaller(2, parts.count - i), last = i + count - 1;
      char* const to = sums + i * kSumBytes;
      multiply_registers<D>(count,
                            {{here + parts.first(i) * row_bytes, here + parts.first(last) * row_bytes},
                             row_bytes,
                             columns,
                             kPanelBytes,
                             {to, to + kSumBytes},
                             kPanelBytes,
                             fetch,
                             lines},
                            steps, step > 0);
      if (step + steps < all_steps) continue;
      for (int64_t part = i; part <= last; ++part) {
        const int64_t begin = part * kRegisterRows, skipped = begin - parts.first(part);
        finish(begin, smaller(begin + kRegisterRows, parts.rows), sums + part * kSumBytes + skipped * kPanelBytes);
      }
    }
  }
}

// Rows times the columns [column, column + columns) of a packed weight: finish(first row, last row, first column, columns,
// their sums).
template <class D, class F>
inline void multiply_panels_by_registers(int64_t num_rows, const void* rows, int64_t row_bytes, const void* weight,
                                         int64_t column, int64_t columns, void* sums, F finish) {
  const RegisterRows parts(num_rows);
  const TileRegisters registers(parts.size);
  for (int64_t c = column; c < column + columns; c += kRegisterPanel) {
    const char* panel = static_cast<const char*>(weight) + c * row_bytes;
    const int64_t count = smaller(kRegisterPanel, column + columns - c);
    multiply_panel_by_registers<D>(
        parts, static_cast<const char*>(rows), row_bytes, panel, static_cast<char*>(sums),
        [&](int64_t first, int64_t last, const void* done) { finish(first, last, c, count, done); });
  }
}

}  // namespace
