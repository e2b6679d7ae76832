// What all row normalizations share: statistics of a cached row, its normalization, and the gradient through both.
#pragma once
#include "../row_norm.h"
#include "vec.h"

namespace {

using hbert::DType;
using hbert::RowNormSums;
using hbert::RowRange;

template <class T, class P>
inline T* row_of(P* base, int64_t row, int64_t width) {
  return static_cast<T*>(base) + row * width;
}

template <class V>
struct Statistics {
  V mean, rstd;
};

template <class V>
inline Statistics<V> stored_statistics(const void* mean, const void* rstd, int64_t row) {
  using R = typename V::real;
  return {V::set(static_cast<const R*>(mean)[row]), V::set(static_cast<const R*>(rstd)[row])};
}

// Mean and reciprocal standard deviation of a row whose sum is known: a second pass over the cached row, because
// E[x^2] - E[x]^2 cancels for large means.
template <class V, class T>
[[gnu::always_inline]] inline Statistics<V> statistics(const T* x, typename V::real sum, int64_t width, double eps,
                                                       void* mean, void* rstd, int64_t row) {
  using R = typename V::real;
  const R center = sum / static_cast<R>(width);
  const V c = V::set(center);
  const R squares = reduce<V>(width, [&](int64_t i, auto part) {
    const V d = V::keep(V::load(x + i, part) - c, part);
    return d * d;
  });
  const R variance = squares / static_cast<R>(width) + static_cast<R>(eps);
  const R scale = sizeof(R) == sizeof(double) ? static_cast<R>(1 / __builtin_sqrt(variance))
                                              : static_cast<R>(1 / __builtin_sqrtf(static_cast<float>(variance)));
  if (mean != nullptr) static_cast<R*>(mean)[row] = center;
  if (rstd != nullptr) static_cast<R*>(rstd)[row] = scale;
  return {c, V::set(scale)};
}

template <class V, class T>
inline typename V::real row_sum(const T* x, int64_t width) {
  return reduce<V>(width, [&](int64_t i, auto part) { return V::load(x + i, part); });
}

// Sinks: what a row becomes. put(i, v, part) for each vector of it, then finish(width).
template <class V, class Y>
struct StoredRow {
  Y* y;
  template <class Part>
  [[gnu::always_inline]] void put(int64_t i, V v, Part part) {
    V::store(y + i, v, part);
  }
  void finish(int64_t) {}
};

// A row without a magnitude of this has scale 0: 127 over less might be infinite.
constexpr float kLeastMagnitude = 0x1p-119f;

// int8 numbers in [-127, 127], beside the row itself if y is not null. A row that holds NaN or infinity has scale NaN.
template <class V, class Y>
struct QuantizedRow {
  Y* y;
  int8_t* values;
  float* scale;
  float* cached;  // [width], scratch
  V largest = V::set(0), zero_or_nan = V::set(0);

  template <class Part>
  [[gnu::always_inline]] void put(int64_t i, V v, Part part) {
    if (y != nullptr) V::store(y + i, v, part);
    v = V::keep(v, part);
    V::store(cached + i, v, part);
    largest = max(largest, V::abs(v));
    zero_or_nan = fma(v, V::set(0), zero_or_nan);
  }
  [[gnu::always_inline]] void finish(int64_t width) {
    const float magnitude = V::max(largest) + V::sum(zero_or_nan);
    const bool quantizable = magnitude >= kLeastMagnitude;  // false for NaN
    *scale = quantizable ? magnitude / 127 : 0 * magnitude;
    const V inverse = V::set(quantizable ? 127 / magnitude : 0);
    for_each<V>(width, [&](int64_t i, auto part) {
      V::store(values + i, quantizable ? V::load(cached + i, part) * inverse : inverse, part);
    });
  }
};

// f(sinks), where sinks(row) is the sink of a row of the outputs of `a`. cached: [width], scratch.
template <class V, class Y, class Forward, class F>
inline void with_sinks(const Forward& a, typename V::real* cached, F f) {
  if constexpr (sizeof(typename V::real) == sizeof(float)) {
    if (a.int8.values != nullptr)
      return f([&a, cached](int64_t row) {
        Y* y = a.y == nullptr ? nullptr : row_of<Y>(a.y, row, a.width);
        return QuantizedRow<V, Y>{y, a.int8.values + row * a.width, a.int8.scale + row, cached};
      });
  }
  f([&a](int64_t row) { return StoredRow<V, Y>{row_of<Y>(a.y, row, a.width)}; });
}

// (x - mean) rstd weight + bias
template <class V, class T, class Sink>
[[gnu::always_inline]] inline void normalize(const T* x, Statistics<V> s, const typename V::real* weight,
                                             const typename V::real* bias, Sink sink, int64_t width) {
  for_each<V>(width, [&](int64_t i, auto part) {
    const V xhat = (V::load(x + i, part) - s.mean) * s.rstd;
    sink.put(i, fma(xhat, V::load(weight + i, part), V::load(bias + i, part)), part);
  });
  sink.finish(width);
}

template <class V, class Part>
inline void add_to(typename V::real* sums, V value, Part part) {
  V::store(sums, value + V::load(sums, part), part);
}

// The gradient of a normalized row v: calls sink(i, part, dv) after adding dy xhat and dy to the sums. dy(i, part) is the
// gradient of the normalized row, 0 in a tail's unused lanes.
template <class V, class T, class Dy, class Sink>
inline void normalize_backward(const T* v, Statistics<V> s, const typename V::real* weight, int64_t width, Dy dy,
                               RowNormSums sums, Sink sink) {
  using R = typename V::real;
  R* dweight = static_cast<R*>(sums.dweight);
  R* dbias = static_cast<R*>(sums.dbias);
  V sum_g = V::set(0), sum_gx = V::set(0);
  for_each<V>(width, [&](int64_t i, auto part) {
    const V d = dy(i, part);
    const V xhat = V::keep((V::load(v + i, part) - s.mean) * s.rstd, part);
    const V g = d * V::load(weight + i, part);
    sum_g = sum_g + g;
    sum_gx = fma(g, xhat, sum_gx);
    add_to<V>(dweight + i, d * xhat, part);
    add_to<V>(dbias + i, d, part);
  });
  const V mean_g = V::set(V::sum(sum_g) / static_cast<R>(width));
  const V mean_gx = V::set(V::sum(sum_gx) / static_cast<R>(width));
  for_each<V>(width, [&](int64_t i, auto part) {
    const V xhat = (V::load(v + i, part) - s.mean) * s.rstd;
    const V g = dy(i, part) * V::load(weight + i, part);
    sink(i, part, s.rstd * (g - mean_g - xhat * mean_gx));
  });
}

}  // namespace
