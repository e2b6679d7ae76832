// Activation functions and their derivatives on vectors.
#pragma once
#include "vec.h"

namespace {

constexpr double kInvSqrt2Pi = 0.3989422804014327, kSqrt2OverPi = 0.7978845608028654, kTanhCubic = 0.044715;

// The standard normal distribution function.
#if defined(HBERT_HAS_FLOAT64)
template <class R>
inline Lanes<R> normal_cdf(Lanes<R> x) {
  for (int i = 0; i < Lanes<R>::kWidth; ++i)
    x.v[i] = static_cast<R>(0.5 + 0.5 * __builtin_erf(x.v[i] * 0.7071067811865476));
  return x;
}
#else
// 1/2 + x P(x^2)/Q(x^2), a minimax fit of ours on |x| <= 5.2, beyond which the tail is below 1e-7. With it x cdf(x) is within
// 1.9e-7 max(1, |x|) of the exact GELU in float32; the exactly rounded erf gives 1.0e-7. The left tail is exactly 0: what is
// left of it would grow with x, and a norm would blow it up in a row that has nothing else.
inline Vec normal_cdf(Vec x) {
  constexpr float kP[] = {2.47458881e-08f, 6.40696087e-06f, 0.000156697378f,
                          0.00460767527f,  0.032528307f,    0.398942263f};
  constexpr float kQ[] = {1.25922556e-06f, 7.0444076e-05f, 0.00181628505f, 0.0279174498f, 0.248202733f, 1.0f};
  const Vec t = max(Vec::set(-5.2f), min(Vec::set(5.2f), x));
  const Vec s = t * t;
  Vec p = Vec::set(kP[0]), q = Vec::set(kQ[0]);
  for (int i = 1; i < 6; ++i) {
    p = fma(p, s, Vec::set(kP[i]));
    q = fma(q, s, Vec::set(kQ[i]));
  }
  return Vec::where_positive(x + Vec::set(5.2f), Vec::set(0.5f) + t * (p / q));
}
#endif

template <class V>
inline V constant(double x) {
  return V::set(static_cast<typename V::real>(x));
}

// Each activation: value(x), and value(x, &derivative).
struct Gelu {
  template <class V>
  static V value(V x) {
    return x * normal_cdf(x);
  }
  template <class V>
  static V value(V x, V* derivative) {
    const V cdf = normal_cdf(x);
    *derivative = fma(x * constant<V>(kInvSqrt2Pi), exp(x * x * constant<V>(-0.5)), cdf);
    return x * cdf;
  }
};

struct GeluTanh {
  // p = (1 + tanh u)/2 = 1/(1 + e^-2u) and 1 - p = e^-2u p, u = sqrt(2/pi)(x + 0.044715 x^3): no cancellation on either side
  template <class V>
  static V cdf(V x, V* complement) {
    const V twice = x * fma(x * x, constant<V>(-2 * kSqrt2OverPi * kTanhCubic), constant<V>(-2 * kSqrt2OverPi));
    const V e = exp(min(V::set(80), twice));  // finite
    const V p = V::set(1) / (V::set(1) + e);
    *complement = e * p;
    return p;
  }
  template <class V>
  static V value(V x) {
    V unused;
    return x * cdf(x, &unused);
  }
  template <class V>
  static V value(V x, V* derivative) {
    V complement;
    const V p = cdf(x, &complement);
    // Farther out p (1 - p) is 0 in exact numbers, here not quite, so that nothing may grow beside it.
    const V square = min(V::set(400), x * x);
    const V slope = fma(square, constant<V>(6 * kSqrt2OverPi * kTanhCubic), constant<V>(2 * kSqrt2OverPi));
    const V out = x * p;
    *derivative = fma(out * complement, slope, p);
    return out;
  }
};

struct Relu {
  template <class V>
  static V value(V x) {
    return max(V::set(0), x);
  }
  template <class V>
  static V value(V x, V* derivative) {
    *derivative = V::where_positive(x, V::set(1));
    return max(V::set(0), x);
  }
};

}  // namespace
