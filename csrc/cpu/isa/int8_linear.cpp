// Matrix product of int8 numbers with exact sums, and its epilogue, compiled once per instruction set level (HBERT_LEVEL). No
// torch, no standard library.
#include "../int8_linear.h"
#include "panels.h"
#if defined(__AMX_TILE__)
#include "amx_panels.h"
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

using hbert::DType;
using hbert::Int8Linear;

#if defined(__AMX_TILE__)
constexpr int kPanel = kRegisterPanel;
#else
constexpr int kPanel = kLanes<Vec>;
#endif

template <class Out, class Other>
void finish_rows(const Int8Linear& a, int64_t begin, int64_t end, int64_t column, int64_t count, const int32_t* sums) {
  for (int64_t row = begin; row < end; ++row, sums += kPanel) {
    const Vec scale = Vec::set(a.x_scale[row]);
    const float* weight_scale = a.weight_scale + column;
    const float* bias = a.bias + column;
    const Other* other = a.other == nullptr ? nullptr : static_cast<const Other*>(a.other) + row * a.columns + column;
    Out* out = static_cast<Out*>(a.out) + row * a.columns + column;
    for_each<Vec>(count, [&](int64_t i, auto part) {
      const Vec y =
          fma(Vec::load(sums + i, part) * scale, Vec::load(weight_scale + i, part), Vec::load(bias + i, part));
      Vec::store(out + i, other == nullptr ? y : y + Vec::load(other + i, part), part);
    });
  }
}

using FinishRows = void (*)(const Int8Linear&, int64_t, int64_t, int64_t, int64_t, const int32_t*);

FinishRows finish_for(const Int8Linear& a) {
  const bool narrow_other = a.other_dtype == DType::kBFloat16;
  if (a.out_dtype == DType::kBFloat16) return narrow_other ? finish_rows<bf16, bf16> : finish_rows<bf16, float>;
  return narrow_other ? finish_rows<float, bf16> : finish_rows<float, float>;
}

#if defined(__AMX_TILE__)

int64_t padded_row_bytes(int64_t width) { return round_up(width, kRegisterBytes); }

const void* pack_for_registers(const Int8Linear& a, int64_t begin, int64_t end, void* space) {
  return rows_for_registers(a.x, a.width, begin, end, space);
}

void multiply_by_registers(const Int8Linear& a, int64_t begin, int64_t end, int64_t column, int64_t columns,
                           const void* rows, int32_t* sums) {
  const FinishRows finish = finish_for(a);
  multiply_panels_by_registers<Int8Registers>(
      end - begin, rows, padded_row_bytes(a.width), a.weight, column, columns, sums,
      [&](int64_t first, int64_t last, int64_t c, int64_t count, const void* done) {
        finish(a, begin + first, begin + last, c, count, static_cast<const int32_t*>(done));
      });
}

int64_t max_rows(int64_t width) { return rows_in_cache(padded_row_bytes(width)); }

// Both operands are signed: rows carry no offset, and sums start from zero.
constexpr hbert::Int8LinearKernels kKernels = {
    kPanel, 4, kRegisterRows, false, false, max_rows, padded_row_bytes, pack_for_registers, multiply_by_registers};

#else

// Per level: how rows and weights are held, and one step of the sums. Nothing saturates: vpmaddubsw's sums of two products
// would, so where it is used weights are packed so that they fit 16 bits (kBoundedPairs).
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)

#if defined(__AVX512F__)

struct IntVec {
  static constexpr int kWidth = 16;
  __m512i v;

  static IntVec set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static IntVec load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static void store(int32_t* p, IntVec a) { _mm512_storeu_si512(p, a.v); }
};

#elif defined(__AVX2__)

struct IntVec {
  static constexpr int kWidth = 8;
  __m256i v;

  static IntVec set(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static IntVec load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static void store(int32_t* p, IntVec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
};

#else

struct IntVec {
  static constexpr int kWidth = 8;
  int32x4_t v[2];

  static IntVec set(int32_t x) { return {{vdupq_n_s32(x), vdupq_n_s32(x)}}; }
  static IntVec load(const int32_t* p) { return {{vld1q_s32(p), vld1q_s32(p + 4)}}; }
  static void store(int32_t* p, IntVec a) {
    vst1q_s32(p, a.v[0]);
    vst1q_s32(p + 4, a.v[1]);
  }
};

#endif

#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kBoundedPairs = false;

inline int32x4_t add_products(int32x4_t x, int32x4_t w, int32x4_t sum) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
}

inline IntVec add_products(IntVec x, IntVec w, IntVec sum) {
  return {{add_products(x.v[0], w.v[0], sum.v[0]), add_products(x.v[1], w.v[1], sum.v[1])}};
}

#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kBoundedPairs = false;

inline IntVec add_products(IntVec x, IntVec w, IntVec sum) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(sum.v, x.v, w.v)};
#else
  return {_mm256_dpbusd_avx_epi32(sum.v, x.v, w.v)};
#endif
}

#else
constexpr bool kBoundedPairs = true;

// Sums of two products in 16 bits, then of two of these in 32.
inline IntVec add_products(IntVec x, IntVec w, IntVec sum) {
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_maddubs_epi16(x.v, w.v);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#else
  const __m256i pairs = _mm256_maddubs_epi16(x.v, w.v);
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#endif
}

#endif

// Four products a step; x86 has those of unsigned and signed numbers, and reads the rows as x + 128.
struct Int8Dot {
  // What a row holds per step, whatever the numbers are of which it is made.
  typedef uint32_t __attribute__((may_alias)) Unit;
  using Operand = IntVec;
  using Number = uint8_t;
  struct Weight {
    int8_t of[4];
  };
  static constexpr int kGroup = 4;
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr bool kOffset = false;
#else
  static constexpr bool kOffset = true;
#endif

  static Operand load(const Weight* p) { return IntVec::load(reinterpret_cast<const int32_t*>(p)); }
  static Operand broadcast(Unit x) { return IntVec::set(static_cast<int32_t>(x)); }
  static IntVec multiply_add(Operand x, Operand w, IntVec sum) { return add_products(x, w, sum); }
  static Number number(int8_t x) { return static_cast<Number>(kOffset ? x + 128 : x); }
};

#else

constexpr bool kBoundedPairs = false;

struct IntVec {
  static constexpr int kWidth = 8;
  int32_t v[kWidth];

  static IntVec load(const int32_t* p) {
    IntVec out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = p[i];
    return out;
  }
  static void store(int32_t* p, IntVec a) {
    for (int i = 0; i < kWidth; ++i) p[i] = a.v[i];
  }
};

struct Int8Dot {
  using Unit = int16_t;
  using Number = int16_t;
  struct Weight {
    int8_t of[1];
  };
  struct Operand {
    int16_t v[IntVec::kWidth];
  };
  static constexpr int kGroup = 1;
  static constexpr bool kOffset = false;

  static Operand load(const Weight* p) {
    Operand out;
    for (int i = 0; i < IntVec::kWidth; ++i) out.v[i] = p[i].of[0];
    return out;
  }
  static Operand broadcast(Unit x) {
    Operand out;
    for (int i = 0; i < IntVec::kWidth; ++i) out.v[i] = x;
    return out;
  }
  static IntVec multiply_add(Operand x, Operand w, IntVec sum) {
    for (int i = 0; i < IntVec::kWidth; ++i) sum.v[i] += static_cast<int32_t>(x.v[i]) * w.v[i];
    return sum;
  }
  static Number number(int8_t x) { return x; }
};

#endif

using Unit = Int8Dot::Unit;
using Weight = Int8Dot::Weight;
static_assert(IntVec::kWidth == Vec::kWidth);

inline int64_t steps_in(int64_t width) { return (width + Int8Dot::kGroup - 1) / Int8Dot::kGroup; }

int64_t row_bytes(int64_t width) { return steps_in(width) * static_cast<int64_t>(sizeof(Unit)); }

// Packed rows stay in the second cache. That of processors with AVX-512 is larger, and fewer tasks read the weight less often.
int64_t max_rows(int64_t width) {
  constexpr int64_t kMinRows = 24, kMaxRows = Vec::kWidth == 16 ? 256 : 96;
  constexpr int64_t kMaxBytes = (Vec::kWidth == 16 ? 640 : 192) << 10;
  const int64_t fitting = smaller(kMaxBytes / row_bytes(width), kMaxRows);
  return fitting < kMinRows ? kMinRows : fitting;
}

const void* pack(const Int8Linear& a, int64_t begin, int64_t end, void* space) {
  using Number = Int8Dot::Number;
  const int64_t width = a.width, padded = steps_in(width) * Int8Dot::kGroup;
  Number* __restrict__ to = static_cast<Number*>(space);
  const int8_t* x = a.x + begin * width;
  for (int64_t row = begin; row < end; ++row, to += padded, x += width) {
    for (int64_t k = 0; k < width; ++k) to[k] = Int8Dot::number(x[k]);
    for (int64_t k = width; k < padded; ++k) to[k] = 0;
  }
  return space;
}

// Adds to the sums of kRows rows with a panel. Not inlined: inside a big function, compilers spill the tile. One loop over the
// tile: GCC 12 leaves what two nested ones index in memory, and so it does where it knows that there is a step.
template <int kRows>
[[gnu::noinline]] void add_tile(const Unit* rows, int64_t stride, const Weight* weights, int64_t steps, Fetch fetch,
                                int32_t* sums) {
  constexpr int kSums = kRows * kTileVectors, kWidth = IntVec::kWidth;
  IntVec tile[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) tile[i] = IntVec::load(sums + i * kWidth);
  asm("" : "+r"(steps));
  for (int64_t k = 0; k < steps; ++k, fetch.from += fetch.stride) {
    __builtin_prefetch(fetch.from, 0, 2);
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      const Int8Dot::Operand row = Int8Dot::broadcast(rows[i / kTileVectors * stride + k]);
      const Int8Dot::Operand column = Int8Dot::load(weights + k * kPanel + i % kTileVectors * kWidth);
      tile[i] = Int8Dot::multiply_add(row, column, tile[i]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) IntVec::store(sums + i * kWidth, tile[i]);
}

inline void add_rows(int64_t count, const Unit* rows, int64_t stride, const Weight* weights, int64_t steps, Fetch fetch,
                     int32_t* sums) {
  switch (count) {
    case 1: return add_tile<1>(rows, stride, weights, steps, fetch, sums);
    case 2: return add_tile<2>(rows, stride, weights, steps, fetch, sums);
    case 3: return add_tile<3>(rows, stride, weights, steps, fetch, sums);
    case 4: return add_tile<4>(rows, stride, weights, steps, fetch, sums);
    case 5: return add_tile<5>(rows, stride, weights, steps, fetch, sums);
    default: return add_tile<kTileRows>(rows, stride, weights, steps, fetch, sums);
  }
}

void multiply(const Int8Linear& a, int64_t begin, int64_t end, int64_t column, int64_t columns, const void* rows,
              int32_t* sums) {
  const FinishRows finish = finish_for(a);
  const int64_t steps = steps_in(a.width);
  const Tiles tiles(end - begin);
  for (int64_t c = column; c < column + columns; c += kPanel) {
    for (int64_t r = 0; r < end - begin; ++r)
      for (int i = 0; i < kPanel; ++i) sums[r * kPanel + i] = a.start[c + i];
    // A tile is finished at once: the lines of the output are fetched while the next one computes.
    const auto add = [&](int64_t tile, int64_t step, int64_t block, const char* weights, Fetch fetch) {
      const int64_t first = tiles.first(tile), size = tiles.size(tile);
      add_rows(size, static_cast<const Unit*>(rows) + first * steps + step, steps,
               reinterpret_cast<const Weight*>(weights), block, fetch, sums + first * kPanel);
      if (step + block == steps)
        finish(a, begin + first, begin + first + size, c, smaller(kPanel, column + columns - c), sums + first * kPanel);
    };
    constexpr int64_t kStepBytes = kPanel * sizeof(Weight);
    for_each_tile(tiles, reinterpret_cast<const Weight*>(a.weight) + c * steps, steps, kStepBytes, kStepBytes, add);
  }
}

constexpr hbert::Int8LinearKernels kKernels = {kPanel,   Int8Dot::kGroup, 1,    Int8Dot::kOffset, kBoundedPairs,
                                               max_rows, row_bytes,       pack, multiply};

#endif

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const Int8LinearKernels kInt8Linear = kKernels;
}
}  // namespace hbert
