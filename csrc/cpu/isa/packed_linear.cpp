// Product of rows and a packed weight, and its epilogue, compiled once per instruction set level (HBERT_LEVEL). No torch, no
// standard library.
#include "../packed_linear.h"

#include "activation.h"
#include "panels.h"
#if defined(__AMX_TILE__)
#include "amx_panels.h"
#endif

namespace {

using hbert::Activation;
using hbert::PackedLinear;

constexpr int kPanel = kLanes<Vec>;
// Steps of a sum that are one chain: with 64 the whole product takes 5% longer than with 256, with 128 half of that.
constexpr int64_t kLongChain = 128;
// Whether what a step reads of the rows of a tile is laid side by side. A tile of many vectors reads rows where they are at
// the same speed.
constexpr bool kInterleaved = kTileVectors < 4;

// How numbers are multiplied; Stored is what a packed weight holds per step, unit_of(x, step, width) what the rows give for it.
struct Float : Plain<Vec> {
  using Stored = float;
  static Unit unit_of(const float* x, int64_t step, int64_t) { return x[step]; }
};

// As float32, which they become once they are read: the weight block by block, for all tiles.
struct Widened : Plain<Vec> {
  using Stored = bf16;
  static Unit unit_of(const bf16* x, int64_t step, int64_t) { return widen(x[step]); }
};

#if defined(__AVX512BF16__)
struct Pairs : Bf16Pairs {
  using Stored = Unit;
  static Unit unit_of(const bf16* x, int64_t step, int64_t width) {
    const uint32_t low = x[2 * step].bits;
    return 2 * step + 1 < width ? low | static_cast<uint32_t>(x[2 * step + 1].bits) << 16 : low;
  }
};
#endif

template <class D>
constexpr bool kWidens = sizeof(typename D::Stored) < sizeof(typename D::Unit);

// Of a task. Rows laid side by side have to stay in the second cache; others are read in the order in which they are, by Intel's
// processors (those with AMX) more slowly the more they are.
int64_t max_rows(int64_t) {
#if defined(__AMX_TILE__)
  return 128;
#else
  return kInterleaved ? 96 : 256;
#endif
}

template <class D>
int64_t row_bytes(int64_t width) {
  return steps_of<D>(width) * static_cast<int64_t>(sizeof(typename D::Unit));
}

// Where a tile finds unit k of its row r, of kRows: [tiles, steps, rows of the tile] or [rows, steps].
template <int kRows>
inline int64_t place(int64_t k, int64_t r, int64_t steps) {
  return kInterleaved ? k * kRows + r : r * steps + k;
}

template <class D, class Number>
const void* pack(const PackedLinear& a, int64_t begin, int64_t end, void* space) {
  using Unit = typename D::Unit;
  const int64_t steps = steps_of<D>(a.width);
  const Number* x = static_cast<const Number*>(a.x) + begin * a.width;
  if (!kInterleaved && !kWidens<D> && a.width % D::kPair == 0) return x;
  const Tiles tiles(end - begin);
  Unit* to = static_cast<Unit*>(space);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t size = tiles.size(tile);
    for (int64_t r = 0; r < size; ++r, x += a.width)
      for (int64_t k = 0; k < steps; ++k) to[kInterleaved ? k * size + r : r * steps + k] = D::unit_of(x, k, a.width);
    to += size * steps;
  }
  return space;
}

// Adds to the sums of kRows rows with a panel, by chains of kLongChain steps: the rounding error of a chain grows with its
// length. Not inlined: inside a big function, compilers spill the tile.
template <class D, int kRows>
[[gnu::noinline]] void add_tile(const typename D::Unit* rows, int64_t stride, const typename D::Unit* weights,
                                int64_t steps, Fetch fetch, float* sums) {
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
      typename D::Operand column[kTileVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) column[i] = D::load(weights + k * kPanel + i * kWidth);
      __builtin_prefetch(fetch.from, 0, 2);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto row = D::broadcast(rows[place<kRows>(k, r, stride)]);
#pragma GCC unroll 8
        for (int i = 0; i < kTileVectors; ++i) tile[r][i] = D::multiply_add(row, column[i], tile[r][i]);
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

template <class D>
inline void add_rows(int64_t count, const typename D::Unit* rows, int64_t stride, const typename D::Unit* weights,
                     int64_t steps, Fetch fetch, float* sums) {
  switch (count) {
    case 1: return add_tile<D, 1>(rows, stride, weights, steps, fetch, sums);
    case 2: return add_tile<D, 2>(rows, stride, weights, steps, fetch, sums);
    case 3: return add_tile<D, 3>(rows, stride, weights, steps, fetch, sums);
    case 4: return add_tile<D, 4>(rows, stride, weights, steps, fetch, sums);
    case 5: return add_tile<D, 5>(rows, stride, weights, steps, fetch, sums);
    default: return add_tile<D, kTileRows>(rows, stride, weights, steps, fetch, sums);
  }
}

struct Identity {
  static Vec value(Vec x) { return x; }
};

// What becomes of the sums of rows [begin, end) with `count` columns of a panel.
template <class Number, class Act, int kPanel>
void finish_rows(const PackedLinear& a, int64_t begin, int64_t end, int64_t column, int64_t count, const float* sums) {
  Number* out = static_cast<Number*>(a.out) + column;
  const Number* other = a.other == nullptr ? nullptr : static_cast<const Number*>(a.other) + column;
  for_each<Vec>(count, [&](int64_t i, auto part) {
    const Vec bias = a.bias == nullptr ? Vec::set(0) : Vec::load(a.bias + column + i, part);
    const auto result = [&](int64_t row) {
      return Act::value(Vec::load(sums + (row - begin) * kPanel + i, part) + bias);
    };
    if (other == nullptr)
      for (int64_t row = begin; row < end; ++row) Vec::store(out + row * a.columns + i, result(row), part);
    else
      for (int64_t row = begin; row < end; ++row)
        Vec::store(out + row * a.columns + i, result(row) + Vec::load(other + row * a.columns + i, part), part);
  });
}

using FinishRows = void (*)(const PackedLinear&, int64_t, int64_t, int64_t, int64_t, const float*);

template <class Number, int kPanel>
FinishRows finish_for(const PackedLinear& a) {
  if (!a.activated) return finish_rows<Number, Identity, kPanel>;
  switch (a.activation) {
    case Activation::kGelu: return finish_rows<Number, Gelu, kPanel>;
    case Activation::kGeluTanh: return finish_rows<Number, GeluTanh, kPanel>;
    case Activation::kRelu: break;
  }
  return finish_rows<Number, Relu, kPanel>;
}

inline void widen_block(const bf16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += Vec::kWidth) Vec::store(to + i, Vec::load(from + i, Full{}), Full{});
}

template <class D, class Number>
void multiply(const PackedLinear& a, int64_t begin, int64_t end, int64_t column, int64_t columns, const void* rows,
              float* sums) {
  using Unit = typename D::Unit;
  using Stored = typename D::Stored;
  alignas(64) Unit widened[kWidens<D> ? kBlockBytes / sizeof(Unit) : 1];
  const FinishRows finish = finish_for<Number, kPanel>(a);
  const int64_t steps = steps_of<D>(a.width);
  const Tiles tiles(end - begin);
  for (int64_t c = column; c < column + columns; c += kPanel) {
    fill(sums, (end - begin) * kPanel, 0.0f);
    // A tile is finished at once: the lines of the output are fetched while the next one computes.
    const auto add = [&](int64_t tile, int64_t step, int64_t block, const char* weights, Fetch fetch) {
      const int64_t first = tiles.first(tile), size = tiles.size(tile);
      const Unit* here = static_cast<const Unit*>(rows) + first * steps + (kInterleaved ? step * size : step);
      const Unit* read = reinterpret_cast<const Unit*>(weights);
      if constexpr (kWidens<D>) {
        if (tile == 0) widen_block(reinterpret_cast<const Stored*>(weights), block * kPanel, widened);
        read = widened;
      }
      add_rows<D>(size, here, steps, read, block, fetch, sums + first * kPanel);
      if (step + block == steps)
        finish(a, begin + first, begin + first + size, c, smaller(kPanel, column + columns - c), sums + first * kPanel);
    };
    const Stored* panel = static_cast<const Stored*>(a.weight) + c * steps;
    for_each_tile(tiles, panel, steps, kPanel * sizeof(Stored), kPanel * sizeof(Unit), add);
  }
}

template <class D, class Number>
constexpr hbert::PackedLinearKernels kernels() {
  return {kPanel, D::kPair, 1, max_rows, row_bytes<D>, pack<D, Number>, multiply<D, Number>};
}

#if defined(__AMX_TILE__)

int64_t padded_row_bytes(int64_t width) { return round_up(width * 2, kRegisterBytes); }

int64_t max_register_rows(int64_t width) { return rows_in_cache(padded_row_bytes(width)); }

const void* pack_for_registers(const PackedLinear& a, int64_t begin, int64_t end, void* space) {
  return rows_for_registers(static_cast<const bf16*>(a.x), a.width, begin, end, space);
}

void multiply_by_registers(const PackedLinear& a, int64_t begin, int64_t end, int64_t column, int64_t columns,
                           const void* rows, float* sums) {
  const FinishRows finish = finish_for<bf16, kRegisterPanel>(a);
  multiply_panels_by_registers<Bf16Registers>(
      end - begin, rows, padded_row_bytes(a.width), a.weight, column, columns, sums,
      [&](int64_t first, int64_t last, int64_t c, int64_t count, const void* done) {
        finish(a, begin + first, begin + last, c, count, static_cast<const float*>(done));
      });
}

constexpr hbert::PackedLinearKernels kByRegisters = {
    kRegisterPanel, 2, kRegisterRows, max_register_rows, padded_row_bytes, pack_for_registers, multiply_by_registers};

#endif

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const PackedLinearKernels kPackedLinear = kernels<Float, float>();
#if defined(__AMX_TILE__)
extern const PackedLinearKernels kPackedLinearBFloat16 = kByRegisters;
#elif defined(__AVX512BF16__)
extern const PackedLinearKernels kPackedLinearBFloat16 = kernels<Pairs, bf16>();
#else
extern const PackedLinearKernels kPackedLinearBFloat16 = kernels<Widened, bf16>();
#endif
}
}  // namespace hbert
