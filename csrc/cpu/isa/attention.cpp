// Forward of self-attention, compiled once per instruction set level (HBERT_LEVEL) with that level's flags. No torch,
// no standard library: their inline functions would be merged across levels.
#include "../attention.h"
#include "matmul.h"

namespace {

using hbert::AttentionForward;
using hbert::AttentionTask;
using hbert::DType;

// A block of queries meets a block of keys at a time: scores and weights of a block stay in the first cache levels.
constexpr int64_t kKeys = 256;

template <class D, class T>
class Forward {
  using V = typename D::V;
  using Real = typename D::Real;
  using Unit = typename D::Unit;
  static constexpr int64_t kQueries = rows_of_block<D>;

 public:
  Forward(const AttentionForward& args, Arena& arena, int64_t max_length) : args_(args), size_(args.head_size) {
    keys_ = arena.take<Unit>(panels_size<D>(max_length, steps_of<D>(size_)));
    values_ = arena.take<Unit>(panels_size<D>(size_, steps_of<D>(max_length)));
    queries_ = arena.take<Unit>((kQueries + V::kWidth) * row_units<D>(size_));
    scores_ = arena.take<Real>(kQueries * kKeys);
    // A weight of the compute type takes the place of its score.
    weights_ = D::kPair == 1 ? reinterpret_cast<Unit*>(scores_) : arena.take<Unit>(kQueries * kKeys / D::kPair);
    out_ = arena.take<Real>(kQueries * out_stride());
    max_ = arena.take<Real>(kQueries);
    sum_ = arena.take<Real>(kQueries);
  }

  void run(const AttentionTask* tasks, int64_t count) {
    [[maybe_unused]] const typename D::Scope scope;
    for (int64_t i = 0; i < count; ++i) {
      const AttentionTask& task = tasks[i];
      if (i == 0 || task.head != tasks[i - 1].head || task.first != tasks[i - 1].first) pack(task);
      for (int64_t query = task.query_begin; query < task.query_end; query += kQueries)
        attend(task, query, smaller(kQueries, task.query_end - query));
    }
  }

 private:
  int64_t out_stride() const { return round_up(size_, kLanes<V>); }
  int64_t width() const { return args_.num_heads * size_; }

  // The queries (0), keys (1) or values (2) of the task.
  const T* part(const AttentionTask& task, int which) const {
    return static_cast<const T*>(args_.qkv) + task.first * 3 * width() + which * width() + task.head * size_;
  }

  void pack(const AttentionTask& task) {
    pack_panels_transposed<D>(part(task, 1), 3 * width(), task.length, size_, keys_, queries_);
    pack_panels<D>(part(task, 2), 3 * width(), task.length, size_, values_);
  }

  void attend(const AttentionTask& task, int64_t first_query, int64_t count) {
    pack_rows<D>(part(task, 0) + first_query * 3 * width(), 3 * width(), count, size_, queries_);
    fill(out_, kQueries * out_stride(), Real(0));
    fill(max_, kQueries, Real(-__builtin_inf()));
    fill(sum_, kQueries, Real(0));
    for (int64_t key = 0; key < task.length; key += kKeys) {
      const int64_t num_keys = smaller(kKeys, task.length - key);
      score(key, num_keys, count);
      for (int64_t r = 0; r < count; ++r) weigh(r, num_keys);
      gather(key, num_keys, count, steps_of<D>(task.length));
    }
    finish(task, first_query, count);
  }

  // scores = Q K^T
  void score(int64_t key, int64_t num_keys, int64_t count) {
    const int64_t steps = steps_of<D>(size_);
    for (int64_t lane = 0; lane < num_keys; lane += kLanes<V>)
      multiply_into<D>(queries_, row_units<D>(size_), count, keys_ + (key + lane) * steps, num_keys - lane, steps,
                       scores_ + lane, kKeys, false);
  }

  // weights = exp(scale scores - maximum so far) of a row.
  void weigh(int64_t row, int64_t num_keys) {
    Real* scores = scores_ + row * kKeys;
    const int64_t end = row_units<D>(num_keys) * D::kPair;
    fill(scores + num_keys, end - num_keys, Real(-__builtin_inf()));
    V highest = V::set(max_[row]);
    for (int64_t i = 0; i < end; i += V::kWidth) highest = max(highest, V::load(scores + i, Full{}));
    const Real scale = static_cast<Real>(args_.scale), top = V::max(highest);
    const V factor = V::set(scale), largest = V::set(top);
    V sum = V::set(0);
    for (int64_t i = 0; i < end; i += V::kWidth) {
      // Not an fma with -top scale, whose rounding would be in the weights: the largest is exactly 1.
      const V weight = exp((V::load(scores + i, Full{}) - largest) * factor);
      sum = sum + weight;
      D::put_row(weights_ + row * (kKeys / D::kPair) + i / D::kPair, weight);
    }
    if (sum_[row] > 0 && top > max_[row]) decay(row, V::set((max_[row] - top) * scale));
    sum_[row] += V::sum(sum);
    max_[row] = top;
  }

  // What was summed up to now was relative to a smaller maximum.
  void decay(int64_t row, V log_factor) {
    const V factor = exp(log_factor);
    Real* out = out_ + row * out_stride();
    for (int64_t i = 0; i < out_stride(); i += V::kWidth) V::store(out + i, V::load(out + i, Full{}) * factor, Full{});
    sum_[row] *= V::max(factor);
  }

  // out += weights V
  void gather(int64_t key, int64_t num_keys, int64_t count, int64_t all_steps) {
    for (int64_t lane = 0; lane < size_; lane += kLanes<V>)
      multiply_into<D>(weights_, kKeys / D::kPair, count, values_ + lane * all_steps + key / D::kPair * kLanes<V>,
                       size_ - lane, steps_of<D>(num_keys), out_ + lane, out_stride(), true);
  }

  void finish(const AttentionTask& task, int64_t first_query, int64_t count) {
    Real* log_sum_exp = static_cast<Real*>(args_.log_sum_exp) + task.head * args_.num_tokens + task.first + first_query;
    T* out = static_cast<T*>(args_.out) + (task.first + first_query) * width() + task.head * size_;
    const V scale = V::set(static_cast<Real>(args_.scale));
    for (int64_t r = 0; r < count; ++r, out += width()) {
      const V factor = V::set(1 / sum_[r]);
      const Real* row = out_ + r * out_stride();
      for_each<V>(size_, [&](int64_t i, auto part) { V::store(out + i, V::load(row + i, part) * factor, part); });
      // As the backward rounds a score.
      log_sum_exp[r] = V::max(rounded_product(V::set(max_[r]), scale)) + log_of(sum_[r]);
    }
  }

  static float log_of(float x) { return __builtin_logf(x); }
  static double log_of(double x) { return __builtin_log(x); }

  const AttentionForward& args_;
  const int64_t size_;
  Unit *keys_, *values_, *queries_, *weights_;
  Real *scores_, *out_, *max_, *sum_;
};

// f(Forward) for the dtype of the problem.
template <class F>
void with_kernel(const AttentionForward& args, Arena& arena, int64_t max_length, F f) {
#if defined(HBERT_HAS_FLOAT64)
  if (args.dtype == DType::kFloat64) return f(Forward<Plain<Lanes<double>>, double>(args, arena, max_length));
#endif
  if (args.dtype == DType::kBFloat16) return f(Forward<Bf16Dot, bf16>(args, arena, max_length));
  f(Forward<Plain<Vec>, float>(args, arena, max_length));
}

size_t forward_scratch(const AttentionForward& args, int64_t max_length) {
  Arena arena{nullptr, 0};
  with_kernel(args, arena, max_length, [](const auto&) {});
  return arena.used;
}

void forward(const AttentionForward& args, const AttentionTask* tasks, int64_t count, void* scratch) {
  int64_t max_length = 0;
  for (int64_t i = 0; i < count; ++i) max_length = tasks[i].length > max_length ? tasks[i].length : max_length;
  Arena arena{static_cast<char*>(scratch), 0};
  with_kernel(args, arena, max_length, [&](auto kernel) { kernel.run(tasks, count); });
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const AttentionKernels kAttention = {forward_scratch, forward};
}
}  // namespace hbert
