// One small vector type per instruction set level. Everything lives in an anonymous namespace: code compiled with wide
// instructions must never be merged by the linker with the same template compiled for a narrower level.
#pragma once
#include "../level.h"

#if defined(HBERT_SCALAR) && defined(__AVX2__)
#error "the scalar level must not have AVX2: it is the one that computes in float64; take such options out of CXXFLAGS"
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

// How much of a vector an access touches. The loops are written once for both: Full compiles to plain accesses.
struct Full {};
struct Tail {
  int count;
};

inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}

inline bf16 narrow(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#if defined(__AVX2__)

inline float sum_of_lanes(__m128 a) {
  const __m128 pairs = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

// The four sums, each in the order of sum_of_lanes.
inline void store_sums(float* out, __m128 a, __m128 b, __m128 c, __m128 d) {
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
}

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Vec {
  using real = float;
  static constexpr int kWidth = 16;
  __m512 v;

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static __mmask16 mask(Tail t) { return static_cast<__mmask16>((1u << t.count) - 1); }

  static Vec load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, Tail t) { return {_mm512_maskz_loadu_ps(mask(t), p)}; }
  static Vec load(const bf16* p, Full) { return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const bf16* p, Tail t) { return from_bits(_mm256_maskz_loadu_epi16(mask(t), p)); }
  static Vec load(const int32_t* p, Full) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
  static Vec load(const int32_t* p, Tail t) { return {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask(t), p))}; }

  static void store(float* p, Vec a, Full) { _mm512_storeu_ps(p, a.v); }
  static void store(float* p, Vec a, Tail t) { _mm512_mask_storeu_ps(p, mask(t), a.v); }
  static void store(bf16* p, Vec a, Full) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(a)); }
  static void store(bf16* p, Vec a, Tail t) { _mm256_mask_storeu_epi16(p, mask(t), to_bits(a)); }
  // Rounded to the nearest integer, ties to even.
  static void store(int8_t* p, Vec a, Full) { store(p, a, Tail{kWidth}); }
  static void store(int8_t* p, Vec a, Tail t) {
    _mm512_mask_cvtsepi32_storeu_epi8(p, mask(t), _mm512_cvtps_epi32(a.v));
  }

  static Vec keep(Vec a, Full) { return a; }
  static Vec keep(Vec a, Tail t) { return {_mm512_maskz_mov_ps(mask(t), a.v)}; }
  static float sum(Vec a) { return sum_of_lanes(quarter(a)); }
  static void sums(float* out, Vec a, Vec b, Vec c, Vec d) {
    store_sums(out, quarter(a), quarter(b), quarter(c), quarter(d));
  }
  static float max(Vec a) { return _mm512_reduce_max_ps(a.v); }
  static Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // b where a > 0, otherwise 0
  static Vec where_positive(Vec a, Vec b) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ), b.v)};
  }
  // a 2^n for integral n
  static Vec scale(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

 private:
  // What is left to sum: lanes i, i + 4, i + 8 and i + 12 together.
  static __m128 quarter(Vec a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static Vec from_bits(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static __m256i to_bits(Vec a) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i rounded = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where one is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }

#elif defined(__AVX2__)

struct Vec {
  using real = float;
  static constexpr int kWidth = 8;
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static __m256i mask(Tail t) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(t.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static Vec load(const float* p, Full) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float* p, Tail t) { return {_mm256_maskload_ps(p, mask(t))}; }
  static Vec load(const bf16* p, Full) { return from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load(const bf16* p, Tail t) {  // there are no 16-bit masked loads below AVX-512
    alignas(16) bf16 lanes[kWidth] = {};
    for (int i = 0; i < t.count; ++i) lanes[i] = p[i];
    return load(lanes, Full{});
  }

  static Vec load(const int32_t* p, Full) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const int32_t* p, Tail t) { return {_mm256_cvtepi32_ps(_mm256_maskload_epi32(p, mask(t)))}; }

  static void store(float* p, Vec a, Full) { _mm256_storeu_ps(p, a.v); }
  static void store(float* p, Vec a, Tail t) { _mm256_maskstore_ps(p, mask(t), a.v); }
  static void store(bf16* p, Vec a, Full) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(a)); }
  static void store(bf16* p, Vec a, Tail t) {
    alignas(16) bf16 lanes[kWidth];
    store(lanes, a, Full{});
    for (int i = 0; i < t.count; ++i) p[i] = lanes[i];
  }
  // Rounded to the nearest integer, ties to even.
  static void store(int8_t* p, Vec a, Full) {
    const __m256i whole = _mm256_cvtps_epi32(a.v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si64(p, _mm_packs_epi16(words, words));
  }
  static void store(int8_t* p, Vec a, Tail t) {
    int8_t lanes[kWidth];
    store(lanes, a, Full{});
    for (int i = 0; i < t.count; ++i) p[i] = lanes[i];
  }

  static Vec keep(Vec a, Full) { return a; }
  static Vec keep(Vec a, Tail t) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(mask(t)))}; }
  static float sum(Vec a) { return sum_of_lanes(half(a)); }
  static void sums(float* out, Vec a, Vec b, Vec c, Vec d) { store_sums(out, half(a), half(b), half(c), half(d)); }
  static float max(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // b where a > 0, otherwise 0
  static Vec where_positive(Vec a, Vec b) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ), b.v)};
  }
  // a 2^n for integral n in [-253, 254], in two steps that are both normal numbers
  static Vec scale(Vec a, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
  }

 private:
  static __m128 half(Vec a) { return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1)); }
  static __m256 power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static Vec from_bits(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static __m128i to_bits(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }

#else

// Any CPU: eight lanes in an array, which compilers turn into whatever the baseline has (SSE2, NEON). Also in double.
template <class R>
struct Lanes {
  using real = R;
  static constexpr int kWidth = 8;
  R v[kWidth];

  static int count(Full) { return kWidth; }
  static int count(Tail t) { return t.count; }
  static R get(R x) { return x; }
  static R get(bf16 x) { return widen(x); }
  static R get(int32_t x) { return static_cast<R>(x); }
  static void put(R* p, R x) { *p = x; }
  static void put(bf16* p, R x) { *p = narrow(x); }
  // Rounded to the nearest integer, ties to even: beside 1.5 2^23, a float32 has no bit for a fraction.
  static void put(int8_t* p, R x) {
    const float shift = 12582912.0f, shifted = static_cast<float>(x) + shift;
    *p = static_cast<int8_t>(shifted - shift);
  }

  static Lanes set(R x) {
    Lanes out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = x;
    return out;
  }
  template <class T, class Part>
  static Lanes load(const T* p, Part part) {
    Lanes out = set(0);
    for (int i = 0; i < count(part); ++i) out.v[i] = get(p[i]);
    return out;
  }
  template <class T, class Part>
  static void store(T* p, Lanes a, Part part) {
    for (int i = 0; i < count(part); ++i) put(p + i, a.v[i]);
  }
  template <class Part>
  static Lanes keep(Lanes a, Part part) {
    for (int i = count(part); i < kWidth; ++i) a.v[i] = 0;
    return a;
  }
  static R sum(Lanes a) { return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7])); }
  static void sums(R* out, Lanes a, Lanes b, Lanes c, Lanes d) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
  static Lanes abs(Lanes a) {
    for (int i = 0; i < kWidth; ++i) a.v[i] = a.v[i] < 0 ? -a.v[i] : a.v[i];
    return a;
  }
  static Lanes where_positive(Lanes a, Lanes b) {
    for (int i = 0; i < kWidth; ++i) b.v[i] = a.v[i] > 0 ? b.v[i] : 0;
    return b;
  }
  static R max(Lanes a) {
    R out = a.v[0];
    for (int i = 1; i < kWidth; ++i) out = a.v[i] > out ? a.v[i] : out;
    return out;
  }
};

#define HBERT_LANES_OPERATOR(op)                                          \
  template <class R>                                                      \
  inline Lanes<R> operator op(Lanes<R> a, Lanes<R> b) {                   \
    for (int i = 0; i < Lanes<R>::kWidth; ++i) a.v[i] = a.v[i] op b.v[i]; \
    return a;                                                             \
  }
HBERT_LANES_OPERATOR(+)
HBERT_LANES_OPERATOR(-)
HBERT_LANES_OPERATOR(*)
HBERT_LANES_OPERATOR(/)
#undef HBERT_LANES_OPERATOR

template <class R>
inline Lanes<R> fma(Lanes<R> a, Lanes<R> b, Lanes<R> c) {
  return a * b + c;
}
template <class R>
inline Lanes<R> max(Lanes<R> a, Lanes<R> b) {
  for (int i = 0; i < Lanes<R>::kWidth; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
template <class R>
inline Lanes<R> min(Lanes<R> a, Lanes<R> b) {
  for (int i = 0; i < Lanes<R>::kWidth; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
template <class R>
inline Lanes<R> exp(Lanes<R> a) {
  for (int i = 0; i < Lanes<R>::kWidth; ++i)
    a.v[i] = sizeof(R) == sizeof(double) ? __builtin_exp(a.v[i]) : __builtin_expf(static_cast<float>(a.v[i]));
  return a;
}

using Vec = Lanes<float>;
#define HBERT_HAS_FLOAT64 1

#endif

#if !defined(HBERT_HAS_FLOAT64)

// e^x with a relative error below 2 units in the last place; 0 below -104, infinity above 88.8, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7, whose remainder is below 2^-27.
inline Vec exp(Vec x) {
  x = min(Vec::set(89.0f), max(Vec::set(-105.0f), x));
  const Vec n = Vec::round(x * Vec::set(1.44269504f));
  // ln 2 = 0.693359375 (few bits: n times it is exact) - 2.1219444e-4
  const Vec r = fma(n, Vec::set(2.12194440e-4f), fma(n, Vec::set(-0.693359375f), x));
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec p = Vec::set(1.0f / 5040);
  for (int i = 0; i < 7; ++i) p = fma(p, r, Vec::set(kTaylor[i]));
  return Vec::scale(p, n);
}

#endif

// a b, rounded. Compilers would make one operation, rounded once, of a product and the sum that follows it.
template <class V>
inline V rounded_product(V a, V b) {
  return fma(a, b, V::set(0));
}

// f(offset, Full{}) for every whole vector of [0, n), then f(offset, Tail{}) for what is left. Always inlined, as what is built on
// it: a call would keep what f has captured in memory.
template <class V, class F>
[[gnu::always_inline]] inline void for_each(int64_t n, F f) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) f(i, Full{});
  if (i < n) f(i, Tail{static_cast<int>(n - i)});
}

// The sum over [0, n) of term(offset, part), where a tail's unused lanes must come out as zero. Four partial sums hide the
// latency of the additions; their order depends on n alone.
template <class V, class F>
[[gnu::always_inline]] inline typename V::real reduce(int64_t n, F term) {
  V sums[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + 4 * V::kWidth <= n; i += 4 * V::kWidth)
    for (int k = 0; k < 4; ++k) sums[k] = sums[k] + term(i + k * V::kWidth, Full{});
  for (; i + V::kWidth <= n; i += V::kWidth) sums[0] = sums[0] + term(i, Full{});
  if (i < n) sums[1] = sums[1] + term(i, Tail{static_cast<int>(n - i)});
  return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// f(V{}, T{}) with the vector type that computes on tensors of a dtype, and their element type.
template <class F>
inline void with_types(hbert::DType dtype, F f) {
#if defined(HBERT_HAS_FLOAT64)
  if (dtype == hbert::DType::kFloat64) return f(Lanes<double>{}, double{});
#endif
  dtype == hbert::DType::kBFloat16 ? f(Vec{}, bf16{}) : f(Vec{}, float{});
}

}  // namespace
