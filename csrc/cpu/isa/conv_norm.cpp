// Layer norm followed by a short depthwise convolution, in one pass: a ring of `taps` normalized rows stays in cache.
#include "row_norm.h"

namespace {

using hbert::ConvNormBackward;
using hbert::ConvNormForward;

template <class V, class X, class Sinks>
void forward_as(const ConvNormForward& a, RowRange range, typename V::real* ring, Sinks sinks) {
  using R = typename V::real;
  const int64_t reach = a.taps / 2, first = range.begin - reach;
  const R* weight = static_cast<const R*>(a.weight);
  const R* bias = static_cast<const R*>(a.bias);
  const R* conv = static_cast<const R*>(a.conv_weight);
  for (int64_t row = first < range.first_row ? range.first_row : first; row < range.end + reach; ++row) {
    if (row < range.end_row) {
      // Rows of the neighbouring chunks are normalized again here; their own chunk stores the statistics.
      const bool own = row >= range.begin && row < range.end;
      const X* x = row_of<const X>(a.x, row, a.width);
      const Statistics<V> s =
          statistics<V>(x, row_sum<V>(x, a.width), a.width, a.eps, own ? a.mean : nullptr, own ? a.rstd : nullptr, row);
      normalize<V>(x, s, weight, bias, StoredRow<V, R>{ring + (row % a.taps) * a.width}, a.width);
    }
    const int64_t target = row - reach;
    if (target < range.begin) continue;
    const int64_t from = target - reach < range.first_row ? range.first_row : target - reach;
    const int64_t to = target + reach >= range.end_row ? range.end_row - 1 : target + reach;
    auto sink = sinks(target);
    for_each<V>(a.width, [&](int64_t i, auto part) {
      V sum = V::set(0);
      for (int64_t t = from; t <= to; ++t)
        sum = fma(V::load(conv + (t - target + reach) * a.width + i, part),
                  V::load(ring + (t % a.taps) * a.width + i, part), sum);
      sink.put(i, sum, part);
    });
    sink.finish(a.width);
  }
}

template <class V, class X>
void backward_as(const ConvNormBackward& a, RowRange range, RowNormSums sums, void* scratch) {
  using R = typename V::real;
  const int64_t reach = a.taps / 2;
  R* gradient = static_cast<R*>(scratch);
  R* dconv = static_cast<R*>(sums.dsource);
  const R* weight = static_cast<const R*>(a.weight);
  const R* bias = static_cast<const R*>(a.bias);
  const R* conv = static_cast<const R*>(a.conv_weight);
  for (int64_t row = range.begin; row < range.end; ++row) {
    const X* x = row_of<const X>(a.x, row, a.width);
    X* dx = row_of<X>(a.dx, row, a.width);
    const Statistics<V> s = stored_statistics<V>(a.mean, a.rstd, row);
    // Y_row reached the outputs at row - j through tap j: only gradients of other rows are read, never their Y.
    const int64_t from = row - reach < range.first_row ? range.first_row : row - reach;
    const int64_t to = row + reach >= range.end_row ? range.end_row - 1 : row + reach;
    for_each<V>(a.width, [&](int64_t i, auto part) {
      const V xhat = (V::load(x + i, part) - s.mean) * s.rstd;
      const V y = fma(xhat, V::load(weight + i, part), V::load(bias + i, part));
      V sum = V::set(0);
      for (int64_t t = from; t <= to; ++t) {
        const int64_t tap = (row - t + reach) * a.width + i;
        const V d = V::load(row_of<const X>(a.dy, t, a.width) + i, part);
        sum = fma(V::load(conv + tap, part), d, sum);
        add_to<V>(dconv + tap, d * y, part);
      }
      V::store(gradient + i, sum, part);
    });
    normalize_backward(
        x, s, weight, a.width, [&](int64_t i, auto part) { return V::load(gradient + i, part); }, sums,
        [&](int64_t i, auto part, V dv) { V::store(dx + i, dv, part); });
  }
}

void forward(const ConvNormForward& a, RowRange range, void* scratch) {
  with_types(a.x_dtype, [&](auto v, auto x) {
    using V = decltype(v);
    using X = decltype(x);
    auto* ring = static_cast<typename V::real*>(scratch);
    with_sinks<V, X>(a, ring + a.taps * a.width, [&](auto sinks) { forward_as<V, X>(a, range, ring, sinks); });
  });
}

void backward(const ConvNormBackward& a, RowRange range, RowNormSums sums, void* scratch) {
  with_types(a.x_dtype, [&](auto v, auto x) { backward_as<decltype(v), decltype(x)>(a, range, sums, scratch); });
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const ConvNormKernels kConvNorm = {forward, backward};
}
}  // namespace hbert
