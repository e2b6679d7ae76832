// Small matrix products C = A B whose operands are repacked to fit in cache: A by rows, B by panels of kLanes columns.
//
// The inner dimension is counted in steps. A Dot policy says what a step is: one number multiplied and added in the
// compute type (Plain), or a pair of bfloat16 numbers (Bf16Pairs, AVX512-BF16; Bf16Tiles, AMX). Unit is what A and B
// hold per step: A is [rows, steps], B is [panels, steps, kLanes]. Whoever packs fills the last pair of an odd inner
// dimension with zero, and steps up to a multiple of kSteps.
#pragma once
#include <stddef.h>

#include "vec.h"
#if defined(__AMX_TILE__)
#include "amx.h"
#endif

namespace {

template <class T>
struct Plain {
  using V = T;
  using Real = typename V::real;
  using Unit = Real;
  static constexpr int kPair = 1, kSteps = 1;
  struct Scope {};
  struct Operand {
    V v;
  };

  static Operand load(const Unit* p) { return {V::load(p, Full{})}; }
  static Operand broadcast(Unit a) { return {V::set(a)}; }
  static V multiply_add(Operand a, Operand b, V sum) { return fma(a.v, b.v, sum); }
  // V::kWidth numbers of a row of A.
  static void put_row(Unit* p, V a) { V::store(p, a, Full{}); }
  // One step of B.
  static void put_step(Unit* p, const V (&rows)[kPair]) { V::store(p, rows[0], Full{}); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using V = Vec;
  using Real = float;
  using Unit = uint32_t;
  static constexpr int kPair = 2, kSteps = 1;
  struct Scope {};
  using Operand = __m512bh;

  static Operand load(const Unit* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Operand broadcast(Unit a) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))); }
  static V multiply_add(Operand a, Operand b, V sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
  static void put_row(Unit* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  }
  static void put_step(Unit* p, const V (&rows)[kPair]) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rows[1].v, rows[0].v));
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

#endif

#if defined(__AMX_TILE__)

// For multiply_into alone, by registers of AMX: A has room for an even number of them, and steps are whole ones.
struct Bf16Tiles : Bf16Pairs {
  static constexpr int kSteps = kRegisterRows;
  struct Scope {
    TileRegisters registers{kRegisterRows};
  };
};

#endif

// How products of bfloat16 numbers are computed at this level.
#if defined(__AMX_TILE__)
using Bf16Dot = Bf16Tiles;
#elif defined(__AVX512BF16__)
using Bf16Dot = Bf16Pairs;
#else
using Bf16Dot = Plain<Vec>;
#endif

template <int n>
struct Count {
  static constexpr int value = n;
};

// Rows and vectors of a tile of C that is kept in registers.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileVectors = 2;
#else
constexpr int kTileVectors = 1;
#endif

// Rows of A that are multiplied at a time where what is made of them comes next.
template <class D>
constexpr int64_t rows_of_block = D::kSteps > 1 ? 2 * D::kSteps : 4 * kTileRows;

constexpr int64_t kChain = 64;

template <class V>
constexpr int kLanes = kTileVectors * V::kWidth;

template <class R>
inline void fill(R* p, int64_t count, R value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class D>
inline int64_t steps_of(int64_t n) {
  return round_up(n, D::kPair * D::kSteps) / D::kPair;
}

// Units from one row of A to the next: put_row writes whole vectors.
template <class D>
inline int64_t row_units(int64_t n) {
  return round_up(n, D::kSteps > 1 ? D::kPair * D::kSteps : D::V::kWidth) / D::kPair;
}

// Units of B with `columns` columns.
template <class D>
inline int64_t panels_size(int64_t columns, int64_t steps) {
  return round_up(columns, kLanes<typename D::V>) * steps;
}

template <class V, int kVectors>
struct Tile {
  using Real = typename V::real;
  static constexpr int kColumns = kVectors * V::kWidth;
  V sums[kTileRows][kVectors];

  void store(Real* c, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) V::store(c + r * stride + i * V::kWidth, sums[r][i], Full{});
  }

  void add_to(Real* c, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        Real* at = c + r * stride + i * V::kWidth;
        V::store(at, V::load(at, Full{}) + sums[r][i], Full{});
      }
  }
};

// One tile of A B, each element summed in one chain.
template <class D, int kVectors>
inline Tile<typename D::V, kVectors> chain_of(const typename D::Unit* a, int64_t a_stride, const typename D::Unit* b,
                                              int64_t steps) {
  using V = typename D::V;
  Tile<V, kVectors> tile;
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) tile.sums[r][c] = V::set(0);
  for (int64_t k = 0; k < steps; ++k) {
    typename D::Operand column[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) column[c] = D::load(b + k * kLanes<V> + c * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const typename D::Operand row = D::broadcast(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) tile.sums[r][c] = D::multiply_add(row, column[c], tile.sums[r][c]);
    }
  }
  return tile;
}

// One tile of A B. The rounding error of a chain grows with its length: long ones are split where the operands are more
// exact than bfloat16.
template <class D, int kVectors>
inline Tile<typename D::V, kVectors> tile_of(const typename D::Unit* a, int64_t a_stride, const typename D::Unit* b,
                                             int64_t steps) {
  using V = typename D::V;
  if (D::kPair > 1 || steps <= kChain) return chain_of<D, kVectors>(a, a_stride, b, steps);
  Tile<V, kVectors> tile = chain_of<D, kVectors>(a, a_stride, b, kChain);
  for (int64_t k = kChain; k < steps; k += kChain) {
    const Tile<V, kVectors> more =
        chain_of<D, kVectors>(a + k, a_stride, b + k * kLanes<V>, smaller(kChain, steps - k));
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) tile.sums[r][c] = tile.sums[r][c] + more.sums[r][c];
  }
  return tile;
}

// f(tile, row) for each tile of `rows` rows (rounded up to whole tiles) of A times a panel of B, of which the first
// `columns` columns are wanted (all, if there are fewer). Not inlined: inside a big function, compilers spill the tile.
template <class D, class F>
[[gnu::noinline]] void multiply_panel(const typename D::Unit* a, int64_t a_stride, int64_t rows,
                                      const typename D::Unit* panel, int64_t columns, int64_t steps, F f) {
  using V = typename D::V;
  const auto with = [&](auto vectors) {
    for (int64_t row = 0; row < rows; row += kTileRows)
      f(tile_of<D, decltype(vectors)::value>(a + row * a_stride, a_stride, panel, steps), row);
  };
  switch ((smaller(columns, kLanes<V>) + V::kWidth - 1) / V::kWidth) {
    case 1: return with(Count<1>{});
#if defined(__AVX2__)
    case 2: return with(Count<2>{});
#endif
#if defined(__AVX512F__)
    case 3: return with(Count<3>{});
    case 4: return with(Count<4>{});
#endif
  }
}

// c (+)= A times a panel of B, of which the first `columns` columns are wanted. Whole tiles of c are written.
template <class D>
inline void multiply_into(const typename D::Unit* a, int64_t a_stride, int64_t rows, const typename D::Unit* panel,
                          int64_t columns, int64_t steps, typename D::Real* c, int64_t c_stride, bool add) {
  multiply_panel<D>(a, a_stride, rows, panel, columns, steps, [&](const auto& tile, int64_t row) {
    add ? tile.add_to(c + row * c_stride, c_stride) : tile.store(c + row * c_stride, c_stride);
  });
}

#if defined(__AMX_TILE__)
template <>
inline void multiply_into<Bf16Tiles>(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* panel,
                                     int64_t columns, int64_t steps, float* c, int64_t c_stride, bool add) {
  constexpr int64_t kUnit = sizeof(uint32_t), kLine = kLanes<Vec>;
  for (int64_t lane = 0; lane < smaller(columns, kLine); lane += 2 * kRegisterBytes / kUnit)
    for (int64_t row = 0; row < rows; row += 2 * kRegisterRows) {
      const int64_t next = row + kRegisterRows;
      float* to = c + row * c_stride + lane;
      multiply_registers<Bf16Registers>(next < rows ? 2 : 1,
                                        {{a + row * a_stride, a + next * a_stride},
                                         a_stride * kUnit,
                                         panel + lane,
                                         kLine * kUnit,
                                         {to, to + kRegisterRows * c_stride},
                                         c_stride * kUnit,
                                         nullptr,
                                         0},
                                        steps / kRegisterRows, add);
    }
}
#endif

// Rows of a packed projection lie pages apart, where no hardware prefetcher follows; the next head lies right behind.
template <class T>
inline void prefetch_next_head(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + width + i);
}

// A from `rows` rows of x.
template <class D, class T>
inline void pack_rows(const T* x, int64_t x_stride, int64_t rows, int64_t width, typename D::Unit* a) {
  using V = typename D::V;
  for (int64_t r = 0; r < rows; ++r, x += x_stride, a += row_units<D>(width)) {
    prefetch_next_head(x, width);
    for_each<V>(width, [&](int64_t i, auto part) { D::put_row(a + i / D::kPair, V::load(x + i, part)); });
    const int64_t there = round_up(width, V::kWidth) / D::kPair;
    fill(a + there, row_units<D>(width) - there, typename D::Unit(0));
  }
}

// B from x: its rows are the inner dimension, its columns those of B.
template <class D, class T>
inline void pack_panels(const T* x, int64_t x_stride, int64_t rows, int64_t width, typename D::Unit* b) {
  using V = typename D::V;
  const int64_t steps = steps_of<D>(rows);
  for (int64_t row = 0; row < rows; ++row) prefetch_next_head(x + row * x_stride, width);
  for (int64_t step = 0; step < steps; ++step)
    for_each<V>(width, [&](int64_t i, auto part) {
      V both[D::kPair];
      for (int p = 0; p < D::kPair; ++p) {
        const int64_t row = step * D::kPair + p;
        both[p] = row < rows ? V::load(x + row * x_stride + i, part) : V::set(0);
      }
      D::put_step(b + (i / kLanes<V> * steps + step) * kLanes<V> + i % kLanes<V>, both);
    });
}

#if defined(__AVX512F__)
// The masked forms with all lanes on: GCC 12 takes the plain ones for uses of uninitialized values.
inline __m512 low_singles(__m512 x, __m512 y) { return _mm512_maskz_unpacklo_ps(0xffff, x, y); }
inline __m512 high_singles(__m512 x, __m512 y) { return _mm512_maskz_unpackhi_ps(0xffff, x, y); }
inline __m512 low_pairs(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, _mm512_castps_pd(x), _mm512_castps_pd(y)));
}
inline __m512 high_pairs(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, _mm512_castps_pd(x), _mm512_castps_pd(y)));
}
inline __m512 even_quarters(__m512 x, __m512 y) { return _mm512_maskz_shuffle_f32x4(0xffff, x, y, 0x88); }
inline __m512 odd_quarters(__m512 x, __m512 y) { return _mm512_maskz_shuffle_f32x4(0xffff, x, y, 0xdd); }

// out[c][r] = in[r][c] for 16 x 16 numbers of 32 bits.
inline void transpose_block(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const float* from = static_cast<const float*>(in);
  float* to = static_cast<float*>(out);
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = low_singles(a[i], a[i + 1]);
    b[i + 1] = high_singles(a[i], a[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {
    a[i] = low_pairs(b[i], b[i + 2]);
    a[i + 1] = high_pairs(b[i], b[i + 2]);
    a[i + 2] = low_pairs(b[i + 1], b[i + 3]);
    a[i + 3] = high_pairs(b[i + 1], b[i + 3]);
  }
  // Now quarter q of a[4 i + c] holds rows 4 i to 4 i + 3 of column 4 q + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 top_even = even_quarters(a[c], a[4 + c]), top_odd = odd_quarters(a[c], a[4 + c]);
    const __m512 bottom_even = even_quarters(a[8 + c], a[12 + c]), bottom_odd = odd_quarters(a[8 + c], a[12 + c]);
    _mm512_storeu_ps(to + c * out_stride, even_quarters(top_even, bottom_even));
    _mm512_storeu_ps(to + (4 + c) * out_stride, even_quarters(top_odd, bottom_odd));
    _mm512_storeu_ps(to + (8 + c) * out_stride, odd_quarters(top_even, bottom_even));
    _mm512_storeu_ps(to + (12 + c) * out_stride, odd_quarters(top_odd, bottom_odd));
  }
}
#endif

// out[c][r] = in[r][c] for `rows` rows, and `columns` columns.
template <class U>
inline void transpose(const U* in, int64_t in_stride, int64_t rows, int64_t columns, U* out, int64_t out_stride) {
  int64_t done = 0;
#if defined(__AVX512F__)
  if (sizeof(U) == 4 && rows == 16)
    for (; done + 16 <= columns; done += 16) transpose_block(in + done, in_stride, out + done * out_stride, out_stride);
#endif
  for (int64_t c = done; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * in_stride + c];
}

// B from x: its columns are the inner dimension, its rows the columns of B. `rows_of_a`: scratch, V::kWidth rows of A.
template <class D, class T>
inline void pack_panels_transposed(const T* x, int64_t x_stride, int64_t rows, int64_t width, typename D::Unit* b,
                                   typename D::Unit* rows_of_a) {
  using V = typename D::V;
  const int64_t steps = steps_of<D>(width), units = row_units<D>(width);
  // Columns behind the last row are zero as far as steps of a product over these columns go.
  for (int64_t lane = 0; lane < round_up(rows, D::kPair * D::kSteps); lane += V::kWidth) {
    const int64_t there = lane < rows ? smaller(V::kWidth, rows - lane) : 0;
    pack_rows<D>(x + lane * x_stride, x_stride, there, width, rows_of_a);
    fill(rows_of_a + there * units, (V::kWidth - there) * units, typename D::Unit(0));
    typename D::Unit* to = b + lane / kLanes<V> * kLanes<V> * steps + lane % kLanes<V>;
    transpose(rows_of_a, units, V::kWidth, steps, to, kLanes<V>);
  }
}

// Hands out parts of a block of memory; from no memory, it only adds up their sizes.
struct Arena {
  char* memory;
  size_t used;

  template <class T>
  T* take(int64_t count) {
    char* part = memory == nullptr ? nullptr : memory + used;
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(part);
  }
};

}  // namespace
