// How the product of rows and a packed weight is cut into tasks.
#pragma once
#include <algorithm>
#include <cstdint>

namespace hbert {

// The rows are cut into equal blocks, whatever the number of threads, each multiplied by blocks of columns. A thread packs
// the rows of a block once for all neighbouring blocks of columns that it gets.
struct LinearPlan {
  static constexpr int64_t kTaskColumns = 64;
  static constexpr int64_t kMinProducts = 1 << 18;  // of what one thread does

  static constexpr int64_t kSumRows = 16;  // sums of a block have room for a multiple of so many rows

  int64_t rows, columns, block_rows, row_blocks, column_blocks, grain;

  LinearPlan(int64_t num_rows, int64_t width, int64_t num_columns, int64_t most_rows)
      : rows(num_rows), columns(num_columns) {
    row_blocks = (rows + most_rows - 1) / most_rows;
    block_rows = row_blocks == 0 ? 0 : (rows + row_blocks - 1) / row_blocks;
    column_blocks = (columns + kTaskColumns - 1) / kTaskColumns;
    grain = 1 + kMinProducts / (std::max<int64_t>(block_rows, 1) * width * kTaskColumns);
  }

  int64_t tasks() const { return row_blocks * column_blocks; }
  int64_t sum_rows() const { return (block_rows + kSumRows - 1) / kSumRows * kSumRows; }

  // pack(first row, last row), then multiply(first row, last row, first column, columns) for each task.
  template <class Pack, class Multiply>
  void run(int64_t begin, int64_t end, Pack pack, Multiply multiply) const {
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / column_blocks, column = task % column_blocks * kTaskColumns;
      const int64_t first = block * block_rows, last = std::min(first + block_rows, rows);
      if (first >= last) continue;  // rounding has left nothing to the last block
      if (block != packed) pack(first, last);
      packed = block;
      multiply(first, last, column, std::min(kTaskColumns, columns - column));
    }
  }
};

}  // namespace hbert
