// Layer norm of rows from several sources, compiled once per instruction set level (HBERT_LEVEL) with that level's flags. No
// torch, no standard library: their inline functions would be merged across levels.
#include "row_norm.h"

#include "activation.h"

namespace {

using hbert::Activation;
using hbert::RowNormBackward;
using hbert::RowNormForward;
using hbert::RowSource;

// Forward sources: load(row, &sum) leaves the row to normalize in cache, in memory of type Stored, and gives its sum.
template <class V, class X>
struct PlainForward {
  const RowNormForward& a;
  const X* load(int64_t row, typename V::real* sum) const {
    const X* x = row_of<const X>(a.x, row, a.width);
    *sum = row_sum<V>(x, a.width);
    return x;
  }
};

template <class V, class X, class Residual, class Total>
struct ResidualForward {
  const RowNormForward& a;
  const Total* load(int64_t row, typename V::real* sum) const {
    const X* x = row_of<const X>(a.x, row, a.width);
    const Residual* residual = row_of<const Residual>(a.residual, row, a.width);
    Total* total = row_of<Total>(a.total, row, a.width);
    *sum = reduce<V>(a.width, [&](int64_t i, auto part) {
      V::store(total + i, V::load(x + i, part) + V::load(residual + i, part), part);
      return V::load(total + i, part);  // as rounded
    });
    return total;
  }
};

template <class V, class X, class Act>
struct ActivationForward {
  using R = typename V::real;
  const RowNormForward& a;
  R* cached;
  const R* load(int64_t row, R* sum) const {
    const X* x = row_of<const X>(a.x, row, a.width);
    const R* bias = static_cast<const R*>(a.input_bias);
    *sum = reduce<V>(a.width, [&](int64_t i, auto part) {
      const V v = V::keep(Act::value(V::load(x + i, part) + V::load(bias + i, part)), part);
      V::store(cached + i, v, part);
      return v;
    });
    return cached;
  }
};

template <class V, class X>
struct GatedForward {
  using R = typename V::real;
  const RowNormForward& a;
  const R* gate;
  R* cached;
  const R* load(int64_t row, R* sum) const {
    const X* x = row_of<const X>(a.x, row, a.width);
    *sum = reduce<V>(a.width, [&](int64_t i, auto part) {
      const V v = V::load(x + i, part) * V::load(gate + i, part);
      V::store(cached + i, v, part);
      return v;
    });
    return cached;
  }
};

template <class V, class T, class Sink>
[[gnu::always_inline]] inline void pass(const T* x, Sink sink, int64_t width) {
  for_each<V>(width, [&](int64_t i, auto part) { sink.put(i, V::load(x + i, part), part); });
  sink.finish(width);
}

template <class V, class Source, class Sinks>
void forward_rows(const RowNormForward& a, RowRange range, Source source, Sinks sinks) {
  using R = typename V::real;
  for (int64_t row = range.begin; row < range.end; ++row) {
    R sum;
    const auto* x = source.load(row, &sum);
    if (a.skip_norm) {
      pass<V>(x, sinks(row), a.width);
      continue;
    }
    const Statistics<V> s = statistics<V>(x, sum, a.width, a.eps, a.mean, a.rstd, row);
    normalize<V>(x, s, static_cast<const R*>(a.weight), static_cast<const R*>(a.bias), sinks(row), a.width);
  }
}

template <class V, class X, class Sinks>
void forward_activation(const RowNormForward& a, RowRange range, typename V::real* cached, Sinks sinks) {
  switch (a.activation) {
    case Activation::kGelu: return forward_rows<V>(a, range, ActivationForward<V, X, Gelu>{a, cached}, sinks);
    case Activation::kGeluTanh: return forward_rows<V>(a, range, ActivationForward<V, X, GeluTanh>{a, cached}, sinks);
    case Activation::kRelu: return forward_rows<V>(a, range, ActivationForward<V, X, Relu>{a, cached}, sinks);
  }
}

template <class V, class X, class Sinks>
void forward_residual(const RowNormForward& a, RowRange range, Sinks sinks) {
  if constexpr (sizeof(X) == sizeof(double)) {
    forward_rows<V>(a, range, ResidualForward<V, X, X, X>{a}, sinks);
  } else {
    if (a.residual_dtype == DType::kFloat32)
      return forward_rows<V>(a, range, ResidualForward<V, X, float, float>{a}, sinks);
    return forward_rows<V>(a, range, ResidualForward<V, X, bf16, X>{a}, sinks);  // the sum has the wider type, X
  }
}

template <class V, class X, class Sinks>
void forward_as(const RowNormForward& a, RowRange range, typename V::real* cached, Sinks sinks) {
  using R = typename V::real;
  switch (a.source) {
    case RowSource::kPlain: return forward_rows<V>(a, range, PlainForward<V, X>{a}, sinks);
    case RowSource::kResidual: return forward_residual<V, X>(a, range, sinks);
    case RowSource::kActivation: return forward_activation<V, X>(a, range, cached, sinks);
    case RowSource::kGated:
      return forward_rows<V>(a, range, GatedForward<V, X>{a, row_of<const R>(a.gate, range.sequence, a.width), cached},
                             sinks);
  }
}

void forward(const RowNormForward& a, RowRange range, void* scratch) {
  with_types(a.x_dtype, [&](auto v, auto x) {
    using V = decltype(v);
    using X = decltype(x);
    auto* cached = static_cast<typename V::real*>(scratch);
    // In place: a sink has no use for what the source has cached once it is normalized.
    with_sinks<V, X>(a, cached, [&](auto sinks) { forward_as<V, X>(a, range, cached, sinks); });
  });
}

// The gradient of the normalized row, as stored.
template <class V, class Dy>
struct StoredGradient {
  const Dy* dy;
  template <class Part>
  V operator()(int64_t i, Part part) const {
    return V::load(dy + i, part);
  }
};

template <class V, class Dy, class X>
void backward_stored(const RowNormBackward& a, RowRange range, RowNormSums sums) {
  using R = typename V::real;
  for (int64_t row = range.begin; row < range.end; ++row) {
    const X* x = row_of<const X>(a.x, row, a.width);
    const X* dtotal = a.dtotal == nullptr ? nullptr : row_of<const X>(a.dtotal, row, a.width);
    X* dx = row_of<X>(a.dx, row, a.width);
    normalize_backward(x, stored_statistics<V>(a.mean, a.rstd, row), static_cast<const R*>(a.weight), a.width,
                       StoredGradient<V, Dy>{row_of<const Dy>(a.dy, row, a.width)}, sums,
                       [&](int64_t i, auto part, V dv) {
                         V::store(dx + i, dtotal == nullptr ? dv : dv + V::load(dtotal + i, part), part);
                       });
  }
}

template <class V, class X, class Act>
void backward_activation(const RowNormBackward& a, RowRange range, RowNormSums sums, typename V::real* values) {
  using R = typename V::real;
  const R* bias = static_cast<const R*>(a.input_bias);
  R* dbias = static_cast<R*>(sums.dsource);
  R* slopes = values + a.width;
  for (int64_t row = range.begin; row < range.end; ++row) {
    const X* x = row_of<const X>(a.x, row, a.width);
    X* dx = row_of<X>(a.dx, row, a.width);
    for_each<V>(a.width, [&](int64_t i, auto part) {
      V slope;
      V::store(values + i, Act::value(V::load(x + i, part) + V::load(bias + i, part), &slope), part);
      V::store(slopes + i, slope, part);
    });
    normalize_backward(values, stored_statistics<V>(a.mean, a.rstd, row), static_cast<const R*>(a.weight), a.width,
                       StoredGradient<V, X>{row_of<const X>(a.dy, row, a.width)}, sums,
                       [&](int64_t i, auto part, V dv) {
                         const V d = dv * V::load(slopes + i, part);
                         V::store(dx + i, d, part);
                         add_to<V>(dbias + i, d, part);
                       });
  }
}

template <class V, class X>
void backward_gated(const RowNormBackward& a, RowRange range, RowNormSums sums, typename V::real* values) {
  using R = typename V::real;
  const R* gate = row_of<const R>(a.gate, range.sequence, a.width);
  R* dgate = static_cast<R*>(sums.dsource);
  for (int64_t row = range.begin; row < range.end; ++row) {
    const X* x = row_of<const X>(a.x, row, a.width);
    X* dx = row_of<X>(a.dx, row, a.width);
    for_each<V>(a.width, [&](int64_t i, auto part) {
      V::store(values + i, V::load(x + i, part) * V::load(gate + i, part), part);
    });
    normalize_backward(values, stored_statistics<V>(a.mean, a.rstd, row), static_cast<const R*>(a.weight), a.width,
                       StoredGradient<V, X>{row_of<const X>(a.dy, row, a.width)}, sums,
                       [&](int64_t i, auto part, V dv) {
                         add_to<V>(dgate + i, dv * V::load(x + i, part), part);
                         V::store(dx + i, dv * V::load(gate + i, part), part);
                       });
  }
}

template <class V, class X>
void backward_as(const RowNormBackward& a, RowRange range, RowNormSums sums, void* scratch) {
  auto* values = static_cast<typename V::real*>(scratch);
  if (a.source == RowSource::kGated) return backward_gated<V, X>(a, range, sums, values);
  if (a.source == RowSource::kActivation) {
    switch (a.activation) {
      case Activation::kGelu: return backward_activation<V, X, Gelu>(a, range, sums, values);
      case Activation::kGeluTanh: return backward_activation<V, X, GeluTanh>(a, range, sums, values);
      case Activation::kRelu: return backward_activation<V, X, Relu>(a, range, sums, values);
    }
  }
  if constexpr (sizeof(X) == sizeof(float)) {
    if (a.dy_dtype == DType::kBFloat16) return backward_stored<V, bf16, X>(a, range, sums);
  }
  backward_stored<V, X, X>(a, range, sums);
}

void backward(const RowNormBackward& a, RowRange range, RowNormSums sums, void* scratch) {
  with_types(a.x_dtype, [&](auto v, auto x) { backward_as<decltype(v), decltype(x)>(a, range, sums, scratch); });
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const RowNormKernels kRowNorm = {forward, backward};
}
}  // namespace hbert
