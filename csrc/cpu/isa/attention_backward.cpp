// Backward of self-attention, compiled once per instruction set level (HBERT_LEVEL) with that level's flags. No torch,
// no standard library: their inline functions would be merged across levels.
//
// Weights and their gradients are computed transposed, keys by queries: as rows they are then the left operand of dV
// and dK, and as steps of a panel the right operand of dQ^T, so that none of them is ever transposed in memory.
#include "../attention.h"
#include "matmul.h"

namespace {

using hbert::AttentionBackward;
using hbert::AttentionTask;
using hbert::DType;

constexpr int64_t kKeys = 192;     // a multiple of every rows_of_block
constexpr int64_t kQueries = 128;  // a multiple of every kLanes

template <class D, class T>
class Backward {
  using V = typename D::V;
  using Real = typename D::Real;
  using Unit = typename D::Unit;
  static constexpr int64_t kRows = rows_of_block<D>;

 public:
  Backward(const AttentionBackward& args, Arena& arena, int64_t max_length)
      : args_(args), size_(args.head_size), steps_(steps_of<D>(args.head_size)), units_(row_units<D>(args.head_size)) {
    queries_by_size_ = arena.take<Unit>(panels_size<D>(max_length, steps_));
    dout_by_size_ = arena.take<Unit>(panels_size<D>(max_length, steps_));
    queries_by_row_ = arena.take<Unit>(panels_size<D>(size_, steps_of<D>(max_length)));
    dout_by_row_ = arena.take<Unit>(panels_size<D>(size_, steps_of<D>(max_length)));
    keys_ = arena.take<Unit>(kKeys * units_);
    values_ = arena.take<Unit>(kKeys * units_);
    keys_transposed_ = arena.take<Unit>(size_rows() * row_units<D>(kKeys));
    weights_ = arena.take<Unit>(kKeys * kQueries / D::kPair);
    dscores_ = arena.take<Unit>(kKeys * kQueries / D::kPair);
    dscores_panels_ = arena.take<Unit>(panels_size<D>(kQueries, steps_of<D>(kKeys)));
    spare_units_ = arena.take<Unit>(panels_size<D>(size_, steps_of<D>(kKeys)) + V::kWidth * units_);
    spare_ = arena.take<Real>(kLanes<V> * stride());
    scores_ = arena.take<Real>(kRows * kLanes<V>);
    dweights_of_rows_ = arena.take<Real>(kRows * kLanes<V>);
    dqueries_ = arena.take<Real>(round_up(max_length, kLanes<V>) * size_rows());
    dkeys_ = arena.take<Real>(kKeys * stride());
    dvalues_ = arena.take<Real>(kKeys * stride());
    log_sum_exp_ = arena.take<Real>(round_up(max_length, kLanes<V>));
    delta_ = arena.take<Real>(round_up(max_length, kLanes<V>));
  }

  void run(const AttentionTask& task) {
    [[maybe_unused]] const typename D::Scope scope;
    prepare(task);
    for (int64_t key = 0; key < task.length; key += kKeys) {
      const int64_t num_keys = smaller(kKeys, task.length - key);
      pack_keys(task, key, num_keys);
      fill(dkeys_, kKeys * stride(), Real(0));
      fill(dvalues_, kKeys * stride(), Real(0));
      for (int64_t query = 0; query < task.length; query += kQueries)
        meet(task, num_keys, query, smaller(kQueries, task.length - query));
      store_rows(task, 1, key, dkeys_, num_keys, static_cast<Real>(args_.scale));
      store_rows(task, 2, key, dvalues_, num_keys, 1);
    }
    store_dqueries(task);
  }

 private:
  int64_t width() const { return args_.num_heads * size_; }
  int64_t stride() const { return round_up(size_, kLanes<V>); }
  int64_t size_rows() const { return round_up(size_, kRows); }

  // Where the queries (0), keys (1) or values (2) of the task begin, from `row` on, in qkv and dqkv.
  int64_t offset(const AttentionTask& task, int which, int64_t row) const {
    return (task.first + row) * 3 * width() + which * width() + task.head * size_;
  }
  const T* qkv(const AttentionTask& task, int which, int64_t row) const {
    return static_cast<const T*>(args_.qkv) + offset(task, which, row);
  }

  // The task's rows of out or dout.
  const T* rows(const void* base, const AttentionTask& task) const {
    return static_cast<const T*>(base) + task.first * width() + task.head * size_;
  }

  void prepare(const AttentionTask& task) {
    const int64_t n = task.length, end = round_up(n, kLanes<V>);
    const T* queries = qkv(task, 0, 0);
    const T* dout = rows(args_.dout, task);
    const T* out = rows(args_.out, task);
    pack_panels_transposed<D>(queries, 3 * width(), n, size_, queries_by_size_, spare_units_);
    pack_panels_transposed<D>(dout, width(), n, size_, dout_by_size_, spare_units_);
    pack_panels<D>(queries, 3 * width(), n, size_, queries_by_row_);
    pack_panels<D>(dout, width(), n, size_, dout_by_row_);
    for (int64_t i = 0; i < n; ++i)
      delta_[i] = reduce<V>(size_, [&](int64_t j, auto part) {
        return V::load(dout + i * width() + j, part) * V::load(out + i * width() + j, part);
      });
    const Real* log_sum_exp = static_cast<const Real*>(args_.log_sum_exp) + task.head * args_.num_tokens + task.first;
    for (int64_t i = 0; i < n; ++i) log_sum_exp_[i] = log_sum_exp[i];
    // Columns behind the last query get weight 0.
    fill(log_sum_exp_ + n, end - n, Real(__builtin_inf()));
    fill(delta_ + n, end - n, Real(0));
    fill(dqueries_, end * size_rows(), Real(0));
  }

  void pack_keys(const AttentionTask& task, int64_t key, int64_t num_keys) {
    const T* keys = qkv(task, 1, key);
    pack_rows<D>(keys, 3 * width(), num_keys, size_, keys_);
    pack_rows<D>(qkv(task, 2, key), 3 * width(), num_keys, size_, values_);
    pack_panels<D>(keys, 3 * width(), num_keys, size_, spare_units_);
    const int64_t steps = steps_of<D>(num_keys);
    for (int64_t lane = 0; lane < size_; lane += kLanes<V>)
      for (int64_t step = 0; step < steps; step += V::kWidth)
        transpose(spare_units_ + lane * steps + step * kLanes<V>, kLanes<V>, smaller(V::kWidth, steps - step),
                  smaller(kLanes<V>, size_ - lane), keys_transposed_ + lane * row_units<D>(kKeys) + step,
                  row_units<D>(kKeys));
  }

  // All gradients of a block of queries and a block of keys.
  void meet(const AttentionTask& task, int64_t num_keys, int64_t query, int64_t num_queries) {
    for (int64_t lane = 0; lane < num_queries; lane += kLanes<V>) weigh(num_keys, query, lane, num_queries - lane);
    const int64_t offset = query / D::kPair * kLanes<V>, all_steps = steps_of<D>(task.length);
    for (int64_t lane = 0; lane < size_; lane += kLanes<V>) {
      const int64_t at = lane * all_steps + offset, columns = size_ - lane;
      add_product(weights_, num_keys, dout_by_row_ + at, columns, num_queries, dvalues_ + lane);
      add_product(dscores_, num_keys, queries_by_row_ + at, columns, num_queries, dkeys_ + lane);
    }
    for (int64_t lane = 0; lane < num_queries; lane += kLanes<V>) {
      Real* dqueries = dqueries_ + (query + lane) * size_rows();
      multiply_into<D>(keys_transposed_, row_units<D>(kKeys), size_, dscores_panels_ + lane * steps_of<D>(kKeys),
                       num_queries - lane, steps_of<D>(num_keys), dqueries, kLanes<V>, true);
    }
  }

  // c += a b over num_queries.
  void add_product(const Unit* a, int64_t num_rows, const Unit* panel, int64_t columns, int64_t num_queries, Real* c) {
    multiply_into<D>(a, kQueries / D::kPair, num_rows, panel, columns, steps_of<D>(num_queries), c, stride(), true);
  }

  // Weights and gradients of the scores of all keys of the block and one panel of queries.
  void weigh(int64_t num_keys, int64_t query, int64_t lane, int64_t num_columns) {
    const Unit* queries = queries_by_size_ + (query + lane) * steps_;
    const Unit* dout = dout_by_size_ + (query + lane) * steps_;
    const int64_t columns = smaller(round_up(num_columns, D::kPair * D::kSteps), kLanes<V>);
    for (int64_t row = 0; row < num_keys; row += kRows) {
      const int64_t count = smaller(kRows, num_keys - row);
      multiply_into<D>(keys_ + row * units_, units_, count, queries, columns, steps_, scores_, kLanes<V>, false);
      multiply_into<D>(values_ + row * units_, units_, count, dout, columns, steps_, dweights_of_rows_, kLanes<V>,
                       false);
      for (int64_t r = 0; r < round_up(count, D::kPair * D::kSteps); r += D::kPair)
        for (int64_t c = 0; c < columns; c += V::kWidth)
          put_weights(scores_ + r * kLanes<V> + c, dweights_of_rows_ + r * kLanes<V> + c, kLanes<V>, query, lane + c,
                      row + r, num_keys);
    }
  }

  // One vector of queries, kPair keys.
  void put_weights(const Real* scores, const Real* dweights, int64_t stride, int64_t query, int64_t column, int64_t row,
                   int64_t num_keys) {
    const V scale = V::set(static_cast<Real>(args_.scale));
    const V log_sum_exp = V::load(log_sum_exp_ + query + column, Full{});
    const V delta = V::load(delta_ + query + column, Full{});
    V dscores[D::kPair];
    for (int p = 0; p < D::kPair; ++p) {
      // Rounded as in log_sum_exp: where one key has all the weight, it is exactly 1.
      const V weight = exp(rounded_product(V::load(scores + p * stride, Full{}), scale) - log_sum_exp);
      dscores[p] = weight * (V::load(dweights + p * stride, Full{}) - delta);
      // The row behind an odd number of keys is part of the last step of dQ's inner dimension.
      if (row + p >= num_keys) dscores[p] = V::set(0);
      const int64_t at = ((row + p) * kQueries + column) / D::kPair;
      D::put_row(weights_ + at, weight);
      D::put_row(dscores_ + at, dscores[p]);
    }
    const int64_t panel = column / kLanes<V> * kLanes<V>;
    D::put_step(dscores_panels_ + panel * steps_of<D>(kKeys) + row / D::kPair * kLanes<V> + column - panel, dscores);
  }

  void store_rows(const AttentionTask& task, int which, int64_t row, const Real* from, int64_t count, Real factor) {
    T* to = static_cast<T*>(args_.dqkv) + offset(task, which, row);
    const V scale = V::set(factor);
    for (int64_t r = 0; r < count; ++r, to += 3 * width(), from += stride())
      for_each<V>(size_, [&](int64_t i, auto part) { V::store(to + i, V::load(from + i, part) * scale, part); });
  }

  void store_dqueries(const AttentionTask& task) {
    for (int64_t query = 0; query < task.length; query += kLanes<V>) {
      const Real* transposed = dqueries_ + query * size_rows();
      for (int64_t i = 0; i < size_; i += V::kWidth)
        transpose(transposed + i * kLanes<V>, kLanes<V>, smaller(V::kWidth, size_ - i), kLanes<V>, spare_ + i,
                  stride());
      store_rows(task, 0, query, spare_, smaller(kLanes<V>, task.length - query), static_cast<Real>(args_.scale));
    }
  }

  const AttentionBackward& args_;
  const int64_t size_, steps_, units_;
  Unit *queries_by_size_, *dout_by_size_, *queries_by_row_, *dout_by_row_;
  Unit *keys_, *values_, *keys_transposed_, *weights_, *dscores_, *dscores_panels_, *spare_units_;
  Real *spare_, *scores_, *dweights_of_rows_, *dqueries_, *dkeys_, *dvalues_, *log_sum_exp_, *delta_;
};

// f(Backward) for the dtype of the problem.
template <class F>
void with_kernel(const AttentionBackward& args, Arena& arena, int64_t max_length, F f) {
#if defined(HBERT_HAS_FLOAT64)
  if (args.dtype == DType::kFloat64) return f(Backward<Plain<Lanes<double>>, double>(args, arena, max_length));
#endif
  if (args.dtype == DType::kBFloat16) return f(Backward<Bf16Dot, bf16>(args, arena, max_length));
  f(Backward<Plain<Vec>, float>(args, arena, max_length));
}

size_t backward_scratch(const AttentionBackward& args, int64_t max_length) {
  Arena arena{nullptr, 0};
  with_kernel(args, arena, max_length, [](const auto&) {});
  return arena.used;
}

void backward(const AttentionBackward& args, const AttentionTask* tasks, int64_t count, void* scratch) {
  int64_t max_length = 0;
  for (int64_t i = 0; i < count; ++i) max_length = tasks[i].length > max_length ? tasks[i].length : max_length;
  Arena arena{static_cast<char*>(scratch), 0};
  with_kernel(args, arena, max_length, [&](auto kernel) {
    for (int64_t i = 0; i < count; ++i) kernel.run(tasks[i]);
  });
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const AttentionBackwardKernels kAttentionBackward = {backward_scratch, backward};
}
}  // namespace hbert
