// How a block of rows passes by a panel of packed weights: what packed_linear and int8_linear share.
#pragma once
#include "matmul.h"

namespace {

// Bytes of a panel that stay in the first cache while the rows pass by. Processors with AMX have one of 48 KB; on Zen 5
// twice as many bytes change nothing.
#if defined(__AMX_TILE__)
constexpr int64_t kBlockBytes = 32768;
#else
constexpr int64_t kBlockBytes = 16384;
#endif
// Tiles that fetch what the next block of the panel is into the second cache, each its share.
constexpr int64_t kMaxFetching = 4;

// Tiles of so many rows, as equal as can be: one of two rows would take as long as one of four.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t num_rows) : rows(num_rows), count((num_rows + kTileRows - 1) / kTileRows) {}
  int64_t first(int64_t tile) const { return rows * tile / count; }
  int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
};

// What a tile fetches while it computes: `stride` bytes further after each step.
struct Fetch {
  const char* from;
  int64_t stride;
};

// f(tile, first step, steps, weights of these steps, fetch) for each tile of the rows and each block of steps of a panel, whose
// steps are `bytes` long, and `read_bytes` as the tiles read them. Panels lie in the order in which they are read: while the
// rows pass by one block, the next one is fetched from memory.
template <class F>
inline void for_each_tile(const Tiles& tiles, const void* panel, int64_t steps, int64_t bytes, int64_t read_bytes,
                          F f) {
  const int64_t block_steps = kBlockBytes / read_bytes, fetching = smaller(kMaxFetching, tiles.count);
  const char* weights = static_cast<const char*>(panel);
  for (int64_t step = 0; step < steps; step += block_steps) {
    const int64_t block = smaller(block_steps, steps - step);
    const char *here = weights + step * bytes, *next = here + block * bytes;
    for (int64_t tile = 0; tile < tiles.count; ++tile)
      f(tile, step, block, here,
        tile < fetching ? Fetch{next + tile * block * bytes / fetching, bytes / fetching} : Fetch{here, 0});
  }
}

}  // namespace
