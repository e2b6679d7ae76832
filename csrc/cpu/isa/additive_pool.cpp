// Softmax pooling of packed sequences with one distribution per head: online over blocks of rows that stay in the L1 cache.
#include "../additive_pool.h"
#include "vec.h"

namespace {

using hbert::kMaxPoolHeads;
using hbert::PoolGradient;
using hbert::PoolPart;
using hbert::PoolProblem;
using hbert::RowRange;

constexpr int kBlock = 8;  // rows per block; tables of a block are [heads, kBlock]

template <class X>
struct Block {
  const X* row[kBlock];  // rows behind the end repeat the last one
  int count;
};

template <class X>
Block<X> block_at(const PoolProblem& p, int64_t begin, int64_t end) {
  Block<X> block;
  block.count = end - begin < kBlock ? static_cast<int>(end - begin) : kBlock;
  for (int r = 0; r < kBlock; ++r)
    block.row[r] = static_cast<const X*>(p.x) + (begin + (r < block.count ? r : block.count - 1)) * p.width;
  return block;
}

// out[j, r] = table_j . x_r for J consecutive heads and R consecutive rows, over n values.
template <class V, class X, int R, int J>
inline void dot_tile(const X* const* rows, const typename V::real* table, int64_t stride, int64_t n,
                     typename V::real* out) {
  V sums[J][R];
  for (int j = 0; j < J; ++j)
    for (int r = 0; r < R; ++r) sums[j][r] = V::set(0);
  for_each<V>(n, [&](int64_t i, auto part) {
    V x[R];
    for (int r = 0; r < R; ++r) x[r] = V::load(rows[r] + i, part);
    for (int j = 0; j < J; ++j) {
      const V w = V::load(table + j * stride + i, part);
      for (int r = 0; r < R; ++r) sums[j][r] = fma(x[r], w, sums[j][r]);
    }
  });
  for (int j = 0; j < J; ++j)
    for (int r = 0; r < R; ++r) out[j * kBlock + r] = V::sum(sums[j][r]);
}

// out[j, r] = table_j . x_r of all heads; dense: over whole rows, otherwise over the head's slice.
template <class V, class X>
void dot_heads(const PoolProblem& p, bool dense, const Block<X>& block, const typename V::real* table,
               typename V::real* out) {
  constexpr int kRows = 4;
  for (int r = 0; r < kBlock; r += kRows) {
    const X* const* rows = block.row + r;
    int64_t j = 0;
    if (dense) {
      for (; j + 4 <= p.heads; j += 4)
        dot_tile<V, X, kRows, 4>(rows, table + j * p.width, p.width, p.width, out + j * kBlock + r);
      for (; j < p.heads; ++j)
        dot_tile<V, X, kRows, 1>(rows, table + j * p.width, p.width, p.width, out + j * kBlock + r);
    }
    for (; j < p.heads; ++j) {
      const X* slices[kRows];
      for (int i = 0; i < kRows; ++i) slices[i] = rows[i] + j * p.head_dim;
      dot_tile<V, X, kRows, 1>(slices, table + j * p.head_dim, 0, p.head_dim, out + j * kBlock + r);
    }
  }
}

// table_j += sum_r weight[j, r] x_r for J consecutive heads, over n values.
template <class V, class X, int J>
inline void add_tile(const X* const* rows, const typename V::real* weight, typename V::real* table, int64_t stride,
                     int64_t n) {
  V w[J][kBlock];
  for (int j = 0; j < J; ++j)
    for (int r = 0; r < kBlock; ++r) w[j][r] = V::set(weight[j * kBlock + r]);
  for_each<V>(n, [&](int64_t i, auto part) {
    V sums[J];
    for (int j = 0; j < J; ++j) sums[j] = V::load(table + j * stride + i, part);
    for (int r = 0; r < kBlock; ++r) {
      const V x = V::load(rows[r] + i, part);
      for (int j = 0; j < J; ++j) sums[j] = fma(w[j][r], x, sums[j]);
    }
    for (int j = 0; j < J; ++j) V::store(table + j * stride + i, sums[j], part);
  });
}

// table_j += sum_r weight[j, r] x_r of all heads; rows behind the end must have weight 0.
template <class V, class X>
void add_heads(const PoolProblem& p, bool dense, const Block<X>& block, const typename V::real* weight,
               typename V::real* table) {
  int64_t j = 0;
  if (dense) {
    for (; j + 2 <= p.heads; j += 2)
      add_tile<V, X, 2>(block.row, weight + j * kBlock, table + j * p.width, p.width, p.width);
    for (; j < p.heads; ++j) add_tile<V, X, 1>(block.row, weight + j * kBlock, table + j * p.width, p.width, p.width);
  }
  for (; j < p.heads; ++j) {
    const X* slices[kBlock];
    for (int r = 0; r < kBlock; ++r) slices[r] = block.row[r] + j * p.head_dim;
    add_tile<V, X, 1>(slices, weight + j * kBlock, table + j * p.head_dim, 0, p.head_dim);
  }
}

template <class R>
inline R exp_of(R x) {
  return sizeof(R) == sizeof(double) ? static_cast<R>(__builtin_exp(x))
                                     : static_cast<R>(__builtin_expf(static_cast<float>(x)));
}

template <class V>
void scale_row(typename V::real* row, int64_t n, typename V::real factor) {
  for_each<V>(n, [&](int64_t i, auto part) { V::store(row + i, V::load(row + i, part) * V::set(factor), part); });
}

template <class V, class X>
void forward_as(const PoolProblem& p, RowRange range, PoolPart part) {
  using R = typename V::real;
  const R* scorer = static_cast<const R*>(p.scorer) + range.sequence * p.scorer_stride;
  R *max = static_cast<R*>(part.max), *sum = static_cast<R*>(part.sum), *pooled = static_cast<R*>(part.pooled);
  const int64_t out_width = p.full_output ? p.width : p.head_dim;
  for (int64_t j = 0; j < p.heads; ++j) {
    max[j] = -__builtin_inff();
    sum[j] = 0;
  }
  for (int64_t i = 0; i < p.heads * out_width; ++i) pooled[i] = 0;
  alignas(64) R score[kMaxPoolHeads * kBlock];
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const Block<X> block = block_at<X>(p, begin, range.end);
    dot_heads<V>(p, p.dense_scorer, block, scorer, score);
    for (int64_t j = 0; j < p.heads; ++j) {
      R* s = score + j * kBlock;
      R top = max[j];
      for (int r = 0; r < block.count; ++r) {
        s[r] *= static_cast<R>(p.scale);
        top = s[r] > top ? s[r] : top;
      }
      if (top > max[j]) {
        const R shrink = exp_of(max[j] - top);
        if (begin != range.begin) scale_row<V>(pooled + j * out_width, out_width, shrink);
        sum[j] *= shrink;
        max[j] = top;
      }
      for (int r = 0; r < kBlock; ++r) s[r] = r < block.count ? s[r] - top : -__builtin_inff();
    }
    for_each<V>(p.heads * kBlock,
                [&](int64_t i, auto tail) { V::store(score + i, exp(V::load(score + i, tail)), tail); });
    for (int64_t j = 0; j < p.heads; ++j)
      for (int r = 0; r < kBlock; ++r) sum[j] += score[j * kBlock + r];
    add_heads<V>(p, p.full_output, block, score, pooled);
  }
}

template <class V>
void merge_as(const PoolProblem& p, PoolPart parts, int64_t stride, int64_t count, void* out, void* softmax) {
  using R = typename V::real;
  const R *max = static_cast<R*>(parts.max), *sum = static_cast<R*>(parts.sum), *pooled = static_cast<R*>(parts.pooled);
  const int64_t out_width = p.full_output ? p.width : p.head_dim;
  for (int64_t j = 0; j < p.heads; ++j) {
    R top = max[j];
    for (int64_t c = 1; c < count; ++c) top = max[c * stride + j] > top ? max[c * stride + j] : top;
    R total = 0;
    for (int64_t c = 0; c < count; ++c) total += sum[c * stride + j] * exp_of(max[c * stride + j] - top);
    static_cast<R*>(softmax)[j] = top;
    static_cast<R*>(softmax)[p.heads + j] = total;
    R* row = static_cast<R*>(out) + j * out_width;
    for (int64_t c = 0; c < count; ++c) {
      const V factor = V::set(exp_of(max[c * stride + j] - top) / total);
      const R* source = pooled + c * stride + j * out_width;
      for_each<V>(out_width, [&](int64_t i, auto part) {
        const V value = V::load(source + i, part) * factor;
        V::store(row + i, c == 0 ? value : V::load(row + i, part) + value, part);
      });
    }
  }
}

// dx_r = sum_j alpha[j, r] dpooled_j + dscore[j, r] scorer_j, where either table spans whole rows or the head's slice.
template <class V, class X>
void store_input_gradient(const PoolProblem& p, int64_t row, int r, const typename V::real* scorer,
                          const typename V::real* dpooled, const typename V::real* alpha,
                          const typename V::real* dscore, void* dx) {
  X* out = static_cast<X*>(dx) + row * p.width;
  auto add = [&](V sum, int64_t i, auto part, bool dense, const typename V::real* weight, const typename V::real* table,
                 int64_t head) {
    if (!dense) return fma(V::set(weight[head * kBlock + r]), V::load(table + i, part), sum);
    for (int64_t j = 0; j < p.heads; ++j)
      sum = fma(V::set(weight[j * kBlock + r]), V::load(table + j * p.width + i, part), sum);
    return sum;
  };
  for (int64_t head = 0; head < p.heads; ++head)
    for_each<V>(p.head_dim, [&](int64_t offset, auto part) {
      const int64_t i = head * p.head_dim + offset;
      const V sum = add(V::set(0), i, part, p.dense_scorer, dscore, scorer, head);
      V::store(out + i, add(sum, i, part, p.full_output, alpha, dpooled, head), part);
    });
}

template <class V, class X>
void backward_as(const PoolProblem& p, const PoolGradient& g, RowRange range, void* dscorer) {
  using R = typename V::real;
  const int64_t out_width = p.full_output ? p.width : p.head_dim, table = p.heads * out_width;
  const R* scorer = static_cast<const R*>(p.scorer) + range.sequence * p.scorer_stride;
  const R* max = static_cast<const R*>(g.softmax) + range.sequence * 2 * p.heads;
  const R* sum = max + p.heads;
  const R* pooled = static_cast<const R*>(g.pooled) + range.sequence * table;
  const R* dpooled = static_cast<const R*>(g.dpooled) + range.sequence * table;
  alignas(64) R alpha[kMaxPoolHeads * kBlock], dscore[kMaxPoolHeads * kBlock], mean[kMaxPoolHeads];
  for (int64_t j = 0; j < p.heads; ++j) {
    // sum_t alpha dalpha, because sum_t alpha x_t is the pooled row. Summed as dalpha is: where one token has all the weight
    // the two cancel exactly, as they must before they meet a large scorer.
    const R* row = pooled + j * out_width;
    dot_tile<V, R, 1, 1>(&row, dpooled + j * out_width, 0, out_width, mean + j);
  }
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const Block<X> block = block_at<X>(p, begin, range.end);
    dot_heads<V>(p, p.dense_scorer, block, scorer, alpha);
    dot_heads<V>(p, p.full_output, block, dpooled, dscore);
    for (int64_t j = 0; j < p.heads; ++j)
      for (int r = 0; r < kBlock; ++r) {
        R& a = alpha[j * kBlock + r];
        a = r < block.count ? a * static_cast<R>(p.scale) - max[j] : -__builtin_inff();
      }
    for_each<V>(p.heads * kBlock,
                [&](int64_t i, auto tail) { V::store(alpha + i, exp(V::load(alpha + i, tail)), tail); });
    for (int64_t j = 0; j < p.heads; ++j)
      for (int r = 0; r < kBlock; ++r) {
        const int64_t i = j * kBlock + r;
        alpha[i] /= sum[j];
        dscore[i] = alpha[i] * (dscore[i] - mean[j]) * static_cast<R>(p.scale);
      }
    for (int r = 0; r < block.count; ++r)
      store_input_gradient<V, X>(p, begin + r, r, scorer, dpooled, alpha, dscore, g.dx);
    add_heads<V>(p, p.dense_scorer, block, dscore, static_cast<R*>(dscorer));
  }
}

void forward(const PoolProblem& p, RowRange range, PoolPart part) {
  with_types(p.x_dtype, [&](auto v, auto x) { forward_as<decltype(v), decltype(x)>(p, range, part); });
}

void merge(const PoolProblem& p, PoolPart parts, int64_t stride, int64_t count, void* pooled, void* softmax) {
  with_types(p.x_dtype, [&](auto v, auto) { merge_as<decltype(v)>(p, parts, stride, count, pooled, softmax); });
}

void backward(const PoolProblem& p, const PoolGradient& g, RowRange range, void* dscorer) {
  with_types(p.x_dtype, [&](auto v, auto x) { backward_as<decltype(v), decltype(x)>(p, g, range, dscorer); });
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const PoolKernels kPool = {forward, merge, backward};
}
}  // namespace hbert
