// Row normalization kernels, compiled once per instruction set level (HBERT_LEVEL) with that level's flags. No torch, no
// standard library: their inline functions would be merged across levels.
#include "../row_norm.h"
#include "vec.h"

namespace {

using hbert::DType;
using hbert::LayerNormBackward;
using hbert::LayerNormForward;

template <class T, class P>
inline T* row_of(P* base, int64_t row, int64_t width) {
  return static_cast<T*>(base) + row * width;
}

// Prologues: what is normalized. Each gives the stored row, so that all passes after the first read it from cache.
template <class V, class X>
struct PlainRow {
  using Stored = X;
  const LayerNormForward& a;
  const X* operator()(int64_t row) const { return row_of<const X>(a.x, row, a.width); }
};

template <class V, class X, class Residual, class Total>
struct ResidualRow {
  using Stored = Total;
  const LayerNormForward& a;
  const Total* operator()(int64_t row) const {
    const X* x = row_of<const X>(a.x, row, a.width);
    const Residual* residual = row_of<const Residual>(a.residual, row, a.width);
    Total* total = row_of<Total>(a.total, row, a.width);
    for_each<V>(a.width, [&](int64_t i, auto part) {
      V::store(total + i, V::load(x + i, part) + V::load(residual + i, part), part);
    });
    return total;
  }
};

// Mean and reciprocal standard deviation in two passes: E[x^2] - E[x]^2 cancels for large means.
template <class V, class T>
inline void statistics(const T* x, int64_t width, double eps, typename V::real* mean, typename V::real* rstd) {
  using R = typename V::real;
  const R m = reduce<V>(width, [&](int64_t i, auto part) { return V::load(x + i, part); }) / static_cast<R>(width);
  const V center = V::set(m);
  const R squares = reduce<V>(width, [&](int64_t i, auto part) {
    const V d = V::keep(V::load(x + i, part) - center, part);
    return d * d;
  });
  *mean = m;
  const R variance = squares / static_cast<R>(width) + static_cast<R>(eps);
  *rstd = sizeof(R) == sizeof(double) ? static_cast<R>(1 / __builtin_sqrt(variance))
                                      : static_cast<R>(1 / __builtin_sqrtf(static_cast<float>(variance)));
}

template <class V, class Y, class Prologue>
void forward_rows(const LayerNormForward& a, Prologue prologue, int64_t begin, int64_t end) {
  using R = typename V::real;
  const R* weight = static_cast<const R*>(a.weight);
  const R* bias = static_cast<const R*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const typename Prologue::Stored* x = prologue(row);
    R mean, rstd;
    statistics<V>(x, a.width, a.eps, &mean, &rstd);
    static_cast<R*>(a.mean)[row] = mean;
    static_cast<R*>(a.rstd)[row] = rstd;
    Y* y = row_of<Y>(a.y, row, a.width);
    const V center = V::set(mean), scale = V::set(rstd);
    for_each<V>(a.width, [&](int64_t i, auto part) {
      const V xhat = (V::load(x + i, part) - center) * scale;
      V::store(y + i, fma(xhat, V::load(weight + i, part), V::load(bias + i, part)), part);
    });
  }
}

template <class V, class Dy, class X>
void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, typename V::real* dweight,
                   typename V::real* dbias) {
  using R = typename V::real;
  const R* weight = static_cast<const R*>(a.weight);
  for_each<V>(a.width, [&](int64_t i, auto part) {
    V::store(dweight + i, V::set(0), part);
    V::store(dbias + i, V::set(0), part);
  });
  for (int64_t row = begin; row < end; ++row) {
    const Dy* dy = row_of<const Dy>(a.dy, row, a.width);
    const X* x = row_of<const X>(a.x, row, a.width);
    const V center = V::set(static_cast<const R*>(a.mean)[row]), scale = V::set(static_cast<const R*>(a.rstd)[row]);
    V sum_g = V::set(0), sum_gx = V::set(0);
    for_each<V>(a.width, [&](int64_t i, auto part) {
      const V d = V::load(dy + i, part);
      const V xhat = V::keep((V::load(x + i, part) - center) * scale, part);
      const V g = d * V::load(weight + i, part);
      sum_g = sum_g + g;
      sum_gx = fma(g, xhat, sum_gx);
      V::store(dweight + i, fma(d, xhat, V::load(dweight + i, part)), part);
      V::store(dbias + i, d + V::load(dbias + i, part), part);
    });
    const V mean_g = V::set(V::sum(sum_g) / static_cast<R>(a.width));
    const V mean_gx = V::set(V::sum(sum_gx) / static_cast<R>(a.width));
    X* dx = row_of<X>(a.dx, row, a.width);
    const X* dtotal = a.dtotal == nullptr ? nullptr : row_of<const X>(a.dtotal, row, a.width);
    for_each<V>(a.width, [&](int64_t i, auto part) {
      const V xhat = (V::load(x + i, part) - center) * scale;
      const V g = V::load(dy + i, part) * V::load(weight + i, part);
      const V dnorm = scale * (g - mean_g - xhat * mean_gx);
      V::store(dx + i, dtotal == nullptr ? dnorm : dnorm + V::load(dtotal + i, part), part);
    });
  }
}

template <class V, class X, class Residual, class Total>
void forward_with_residual(const LayerNormForward& a, int64_t begin, int64_t end) {
  forward_rows<V, X>(a, ResidualRow<V, X, Residual, Total>{a}, begin, end);
}

void forward(const LayerNormForward& a, int64_t begin, int64_t end) {
#if defined(HBERT_HAS_FLOAT64)
  using D = Lanes<double>;
  if (a.x_dtype == DType::kFloat64) {
    if (a.residual == nullptr) return forward_rows<D, double>(a, PlainRow<D, double>{a}, begin, end);
    return forward_with_residual<D, double, double, double>(a, begin, end);
  }
#endif
  const bool x_bf16 = a.x_dtype == DType::kBFloat16, residual_bf16 = a.residual_dtype == DType::kBFloat16;
  if (a.residual == nullptr) {
    if (x_bf16) return forward_rows<Vec, bf16>(a, PlainRow<Vec, bf16>{a}, begin, end);
    return forward_rows<Vec, float>(a, PlainRow<Vec, float>{a}, begin, end);
  }
  if (x_bf16 && residual_bf16) return forward_with_residual<Vec, bf16, bf16, bf16>(a, begin, end);
  if (x_bf16) return forward_with_residual<Vec, bf16, float, float>(a, begin, end);
  if (residual_bf16) return forward_with_residual<Vec, float, bf16, float>(a, begin, end);
  return forward_with_residual<Vec, float, float, float>(a, begin, end);
}

void backward(const LayerNormBackward& a, int64_t begin, int64_t end, void* dweight, void* dbias) {
#if defined(HBERT_HAS_FLOAT64)
  if (a.x_dtype == DType::kFloat64)
    return backward_rows<Lanes<double>, double, double>(a, begin, end, static_cast<double*>(dweight),
                                                        static_cast<double*>(dbias));
#endif
  float* dw = static_cast<float*>(dweight);
  float* db = static_cast<float*>(dbias);
  if (a.x_dtype == DType::kBFloat16) return backward_rows<Vec, bf16, bf16>(a, begin, end, dw, db);
  if (a.dy_dtype == DType::kBFloat16) return backward_rows<Vec, bf16, float>(a, begin, end, dw, db);
  return backward_rows<Vec, float, float>(a, begin, end, dw, db);
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const RowNormKernels kRowNorm = {forward, backward};
}
}  // namespace hbert
