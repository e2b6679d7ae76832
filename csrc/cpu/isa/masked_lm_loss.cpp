// Row kernels of the masked-language-model loss, compiled once per instruction set level (HBERT_LEVEL). No torch, no
// standard library.
#include "../masked_lm_loss.h"
#include "vec.h"

namespace {

using hbert::Accumulate;
using hbert::DType;
using hbert::SoftmaxCrossEntropy;

inline float natural_log(float x) { return __builtin_logf(x); }
inline double natural_log(double x) { return __builtin_log(x); }
inline void put(float* p, float x) { *p = x; }
inline void put(double* p, double x) { *p = x; }
inline void put(bf16* p, float x) { *p = narrow(x); }

// The largest of x[0, n), -infinity for n = 0.
template <class V>
inline typename V::real largest(const typename V::real* x, int64_t n) {
  using R = typename V::real;
  R best = static_cast<R>(-__builtin_inf());
  int64_t i = 0;
  V lanes = V::set(best);
  for (; i + V::kWidth <= n; i += V::kWidth) lanes = max(lanes, V::load(x + i, Full{}));
  best = V::max(lanes);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// s = logits + bias. The row then stays in the cache for the passes over it.
template <class V, class T>
inline void widen_row(const T* logits, const typename V::real* bias, int64_t n, typename V::real* s) {
  for_each<V>(n, [&](int64_t i, auto part) {
    const V x = V::load(logits + i, part);
    V::store(s + i, bias == nullptr ? x : x + V::load(bias + i, part), part);
  });
}

// s = exp(s - shift); returns the sum.
template <class V>
inline typename V::real exponentiate(typename V::real* s, int64_t n, typename V::real shift) {
  const V center = V::set(shift);
  return reduce<V>(n, [&](int64_t i, auto part) {
    const V e = V::keep(exp(V::load(s + i, part) - center), part);
    V::store(s + i, e, part);
    return e;
  });
}

template <class V>
inline typename V::real sum_of_differences(const typename V::real* s, int64_t n, typename V::real shift) {
  const V center = V::set(shift);
  return reduce<V>(n, [&](int64_t i, auto part) { return V::keep(V::load(s + i, part) - center, part); });
}

template <class V, class T>
inline void write_gradient(const SoftmaxCrossEntropy& a, const typename V::real* e, typename V::real sum, int64_t label,
                           T* out) {
  using R = typename V::real;
  const R factor = static_cast<R>(a.scale) / sum;
  const R uniform = static_cast<R>(a.scale * a.label_smoothing / static_cast<double>(a.vocab));
  const V scale = V::set(factor), offset = V::set(uniform);
  for_each<V>(a.vocab, [&](int64_t i, auto part) { V::store(out + i, V::load(e + i, part) * scale - offset, part); });
  put(out + label, (e[label] / sum - static_cast<R>(1 - a.label_smoothing)) * static_cast<R>(a.scale) - uniform);
}

template <class V, class T>
void rows(const SoftmaxCrossEntropy& a, int64_t begin, int64_t end, void* scratch) {
  using R = typename V::real;
  const R* bias = static_cast<const R*>(a.bias);
  R* s = static_cast<R*>(scratch);
  const R smoothing = static_cast<R>(a.label_smoothing);
  for (int64_t row = begin; row < end; ++row) {
    T* logits = static_cast<T*>(a.logits) + row * a.stride;
    const int64_t label = a.labels[row];
    widen_row<V>(logits, bias, a.vocab, s);
    const R top = largest<V>(s, a.vocab);
    const R target = s[label] - top;
    const bool first_of_the_largest = target == 0 && largest<V>(s, label) < top;
    // Without smoothing a logit of -infinity must not turn into 0 * -infinity.
    const R mean = a.label_smoothing > 0 ? sum_of_differences<V>(s, a.vocab, top) / static_cast<R>(a.vocab) : R(0);
    const R sum = exponentiate<V>(s, a.vocab, top);
    const R smooth = a.label_smoothing > 0 ? smoothing * mean : R(0);
    // log sum exp - s_label, both relative to the largest: large logits do not cancel.
    static_cast<R*>(a.loss)[row] = natural_log(sum) - (1 - smoothing) * target - smooth;
    a.correct[row] = first_of_the_largest && sum == sum;
    if (a.gradient) write_gradient<V>(a, s, sum, label, logits);
  }
}

void softmax_cross_entropy(const SoftmaxCrossEntropy& a, int64_t begin, int64_t end, void* scratch) {
  with_types(a.dtype, [&](auto v, auto x) { rows<decltype(v), decltype(x)>(a, begin, end, scratch); });
}

template <class T>
void add_compensated(const Accumulate& a, int64_t begin, int64_t end) {
  bf16* sum = static_cast<bf16*>(a.sum) + begin;
  bf16* remainder = static_cast<bf16*>(a.remainder) + begin;
  const T* term = static_cast<const T*>(a.term) + begin;
  for_each<Vec>(end - begin, [&](int64_t i, auto part) {
    const Vec exact = Vec::load(sum + i, part) + (Vec::load(remainder + i, part) + Vec::load(term + i, part));
    Vec::store(sum + i, exact, part);
    Vec::store(remainder + i, exact - Vec::load(sum + i, part), part);
  });
}

template <class T>
void add(const Accumulate& a, int64_t begin, int64_t end) {
  float* sum = static_cast<float*>(a.sum) + begin;
  const T* term = static_cast<const T*>(a.term) + begin;
  for_each<Vec>(end - begin, [&](int64_t i, auto part) {
    Vec::store(sum + i, Vec::load(sum + i, part) + Vec::load(term + i, part), part);
  });
}

void accumulate(const Accumulate& a, int64_t begin, int64_t end) {
  const bool compensated = a.sum_dtype == DType::kBFloat16;
  if (a.term_dtype == DType::kBFloat16)
    return compensated ? add_compensated<bf16>(a, begin, end) : add<bf16>(a, begin, end);
  compensated ? add_compensated<float>(a, begin, end) : add<float>(a, begin, end);
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const MaskedLmLossKernels kMaskedLmLoss = {softmax_cross_entropy, accumulate};
}
}  // namespace hbert
