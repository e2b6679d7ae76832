// Product of float32 rows and a packed weight, and its epilogue, compiled once per instruction set level (HBERT_LEVEL). No
// torch, no standard library.
#include "../packed_linear.h"

#include "activation.h"
#include "panels.h"

namespace {

using hbert::Activation;
using hbert::PackedLinear;

constexpr int kPanel = kLanes<Vec>;
// Products of a sum that are one chain: with 64 the whole product takes 5% longer than with 256, with 128 half of that.
constexpr int64_t kLongChain = 128;

// [tiles, width, rows of the tile]: what a step reads lies side by side.
void pack(const PackedLinear& a, int64_t begin, int64_t end, float* rows) {
  const Tiles tiles(end - begin);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t size = tiles.size(tile);
    for (int64_t r = 0; r < size; ++r) {
      const float* x = a.x + (begin + tiles.first(tile) + r) * a.width;
      for (int64_t k = 0; k < a.width; ++k) rows[k * size + r] = x[k];
    }
    rows += size * a.width;
  }
}

// Adds to the sums of kRows rows with a panel, by chains of kLongChain products: the rounding error of a chain grows
// with its length. Not inlined: inside a big function, compilers spill the tile.
template <int kRows>
[[gnu::noinline]] void add_tile(const float* rows, const float* weights, int64_t steps, Fetch fetch, float* sums) {
  constexpr int kWidth = Vec::kWidth;
  for (int64_t done = 0; done < steps; done += kLongChain) {
    Vec tile[kRows][kTileVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) tile[r][i] = Vec::set(0);
    const int64_t end = smaller(done + kLongChain, steps);
#pragma GCC unroll 4
    for (int64_t k = done; k < end; ++k, fetch.from += fetch.stride) {
      Vec column[kTileVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) column[i] = Vec::load(weights + k * kPanel + i * kWidth, Full{});
      __builtin_prefetch(fetch.from, 0, 2);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec row = Vec::set(rows[k * kRows + r]);
#pragma GCC unroll 8
        for (int i = 0; i < kTileVectors; ++i) tile[r][i] = fma(row, column[i], tile[r][i]);
      }
    }
    asm("" ::: "memory");  // or the sums so far are read before the chain, for which there are no registers
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) {
        float* at = sums + r * kPanel + i * kWidth;
        Vec::store(at, Vec::load(at, Full{}) + tile[r][i], Full{});
      }
  }
}

inline void add_rows(int64_t count, const float* rows, const float* weights, int64_t steps, Fetch fetch, float* sums) {
  switch (count) {
    case 1: return add_tile<1>(rows, weights, steps, fetch, sums);
    case 2: return add_tile<2>(rows, weights, steps, fetch, sums);
    case 3: return add_tile<3>(rows, weights, steps, fetch, sums);
    case 4: return add_tile<4>(rows, weights, steps, fetch, sums);
    case 5: return add_tile<5>(rows, weights, steps, fetch, sums);
    default: return add_tile<kTileRows>(rows, weights, steps, fetch, sums);
  }
}

// The sums of `count` rows with one panel.
void multiply_panel(const float* rows, int64_t count, const float* panel, int64_t steps, float* sums) {
  const Tiles tiles(count);
  fill(sums, count * kPanel, 0.0f);
  const auto add = [&](int64_t tile, int64_t step, int64_t block, const char* weights, Fetch fetch) {
    const int64_t first = tiles.first(tile), size = tiles.size(tile);
    add_rows(size, rows + first * steps + step * size, reinterpret_cast<const float*>(weights), block, fetch,
             sums + first * kPanel);
  };
  for_each_tile(tiles, panel, steps, kPanel * sizeof(float), add);
}

struct Identity {
  static Vec value(Vec x) { return x; }
};

// What becomes of the sums of rows [begin, end) with `count` columns of a panel.
template <class Act>
void finish_rows(const PackedLinear& a, int64_t begin, int64_t end, int64_t column, int64_t count, const float* sums) {
  for_each<Vec>(count, [&](int64_t i, auto part) {
    const Vec bias = a.bias == nullptr ? Vec::set(0) : Vec::load(a.bias + column + i, part);
    const auto result = [&](int64_t row) {
      return Act::value(Vec::load(sums + (row - begin) * kPanel + i, part) + bias);
    };
    const int64_t at = column + i;
    if (a.other == nullptr)
      for (int64_t row = begin; row < end; ++row) Vec::store(a.out + row * a.columns + at, result(row), part);
    else
      for (int64_t row = begin; row < end; ++row)
        Vec::store(a.out + row * a.columns + at, result(row) + Vec::load(a.other + row * a.columns + at, part), part);
  });
}

using FinishRows = void (*)(const PackedLinear&, int64_t, int64_t, int64_t, int64_t, const float*);

FinishRows finish_for(const PackedLinear& a) {
  if (!a.activated) return finish_rows<Identity>;
  switch (a.activation) {
    case Activation::kGelu: return finish_rows<Gelu>;
    case Activation::kGeluTanh: return finish_rows<GeluTanh>;
    case Activation::kRelu: break;
  }
  return finish_rows<Relu>;
}

void multiply(const PackedLinear& a, int64_t begin, int64_t end, int64_t column, int64_t columns, const float* rows,
              float* sums) {
  const FinishRows finish = finish_for(a);
  for (int64_t c = column; c < column + columns; c += kPanel) {
    multiply_panel(rows, end - begin, a.weight + c * a.width, a.width, sums);
    finish(a, begin, end, c, smaller(kPanel, column + columns - c), sums);
  }
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const PackedLinearKernels kPackedLinear = {kPanel, pack, multiply};
}
}  // namespace hbert
