// Softmax pooling of packed sequences with one distribution per head, online over blocks of rows that stay in the L1 cache.
//
// Scores and weights of a block are tables [kBlock, stride()], a row for each token: softmax runs over vectors of heads. The
// products with tables of vectors are small matrix products, in tiles that fill the registers.
#include "../additive_pool.h"
#include "vec.h"

namespace {

using hbert::GateProblem;
using hbert::kMaxPoolHeads;
using hbert::PoolGradient;
using hbert::PoolPart;
using hbert::PoolProblem;
using hbert::RowRange;

constexpr int kBlock = 24;  // rows per block: whole tiles
constexpr int kHeads = 4;   // of a tile
#if defined(__AVX512F__)
constexpr int kScoreRows = 6, kSumVectors = 6, kOutRows = 6, kOutVectors = 4;
#else
constexpr int kScoreRows = 3, kSumVectors = 3, kOutRows = 6, kOutVectors = 2;
#endif

template <int n>
struct Count {
  static constexpr int value = n;
};

// f(offset, Count<n>{}, Full{}) for every n whole vectors of [0, size), then f(offset, Count<1>{}, part) for what is left.
template <class V, int n, class F>
inline void for_groups(int64_t size, F f) {
  int64_t i = 0;
  for (; i + n * V::kWidth <= size; i += n * V::kWidth) f(i, Count<n>{}, Full{});
  for_each<V>(size - i, [&](int64_t rest, auto part) { f(i + rest, Count<1>{}, part); });
}

// f(head, Count<n>{}) for heads in groups of n = kHeads, then one by one.
template <class F>
inline void for_heads(int64_t heads, F f) {
  int64_t j = 0;
  for (; j + kHeads <= heads; j += kHeads) f(j, Count<kHeads>{});
  for (; j < heads; ++j) f(j, Count<1>{});
}

template <class V>
inline int64_t stride(const PoolProblem& p) {
  return (p.heads + V::kWidth - 1) / V::kWidth * V::kWidth;
}

// A table of vectors, one per head: each spans whole rows of x, or the head's own slice of them.
template <class R>
struct Table {
  R* base;
  int64_t size;    // values of a vector
  int64_t x_step;  // from the values of x that meet one head's vector to those of the next
};

template <class R>
inline Table<R> table_of(const PoolProblem& p, bool dense, R* base) {
  return {base, dense ? p.width : p.head_dim, dense ? 0 : p.head_dim};
}

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

// out[r, j] = table_j . x_r for J heads and R rows.
template <class V, int R, int J, bool shared, class X>
[[gnu::noinline]] void score_tile(const X* const* rows, Table<const typename V::real> table, typename V::real* out,
                                  int64_t stride) {
  V sums[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sums[r][j] = V::set(0);
  for_each<V>(table.size, [&](int64_t i, auto part) {
    V x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R && shared; ++r) x[r] = V::load(rows[r] + i, part);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const V w = V::load(table.base + j * table.size + i, part);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sums[r][j] = fma(shared ? x[r] : V::load(rows[r] + j * table.x_step + i, part), w, sums[r][j]);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if constexpr (J == kHeads) V::sums(out + r * stride, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    else
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) out[r * stride + j] = V::sum(sums[r][j]);
  }
}

// out[r, j] = table_j . x_r for `count` rows, rounded up to tiles of R, and all heads.
template <class V, int R, class X>
inline void score_rows(const X* const* rows, int count, int64_t heads, Table<const typename V::real> table,
                       typename V::real* out, int64_t stride) {
  for_heads(heads, [&](int64_t j, auto group) {
    constexpr int J = decltype(group)::value;
    const Table<const typename V::real> part{table.base + j * table.size, table.size, table.x_step};
    for (int r = 0; r < count; r += R) {
      if (table.x_step == 0) {
        score_tile<V, R, J, true>(rows + r, part, out + r * stride + j, stride);
        continue;
      }
      const X* slices[R];
      for (int k = 0; k < R; ++k) slices[k] = rows[r + k] + j * table.x_step;
      score_tile<V, R, J, false>(slices, part, out + r * stride + j, stride);
    }
  });
}

// table_j += sum_r weight[r, j] x_r for J heads.
template <class V, int J, int C, class X, class Part>
[[gnu::noinline]] void sum_tile(const Block<X>& block, int64_t x_offset, const typename V::real* weight, int64_t stride,
                                Table<typename V::real> table, int64_t i, Part part) {
  V sums[J][C];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[j][c] = V::load(table.base + j * table.size + i + c * V::kWidth, part);
  for (int r = 0; r < block.count; ++r, weight += stride) {
    const X* row = block.row[r] + x_offset + i;
    V x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) x[c] = V::load(row + c * V::kWidth, part);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const V w = V::set(weight[j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[j][c] = fma(w, x[c], sums[j][c]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) V::store(table.base + j * table.size + i + c * V::kWidth, sums[j][c], part);
}

// table_j += sum_r weight[r, j] x_r for all heads.
template <class V, class X>
void sum_block(const PoolProblem& p, const Block<X>& block, const typename V::real* weight,
               Table<typename V::real> table) {
  using R = typename V::real;
  const auto add = [&](int64_t j, auto count) {
    constexpr int J = decltype(count)::value;
    constexpr int C = J == 1 ? 4 : kSumVectors;
    const Table<R> part{table.base + j * table.size, table.size, table.x_step};
    for_groups<V, C>(table.size, [&](int64_t i, auto vectors, auto tail) {
      sum_tile<V, J, decltype(vectors)::value>(block, j * table.x_step, weight + j, stride<V>(p), part, i, tail);
    });
  };
  if (table.x_step == 0) return for_heads(p.heads, add);
  for (int64_t j = 0; j < p.heads; ++j) add(j, Count<1>{});
}

inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }

template <class V>
void scale_row(typename V::real* row, int64_t n, typename V::real factor) {
  for_each<V>(n, [&](int64_t i, auto part) { V::store(row + i, V::load(row + i, part) * V::set(factor), part); });
}

template <class V>
struct Softmax {
  using R = typename V::real;
  alignas(64) R max[kMaxPoolHeads], sum[kMaxPoolHeads], decay[kMaxPoolHeads];

  // Scores of a block become exp(score - max), with the sums and `decay`, by which what was summed before shrinks.
  void add(R* score, int count, int64_t stride, R scale) {
    for (int64_t j = 0; j < stride; j += V::kWidth) {
      const V before = V::load(max + j, Full{});
      V top = before;
      for (int r = 0; r < count; ++r) {
        const V s = V::load(score + r * stride + j, Full{}) * V::set(scale);
        V::store(score + r * stride + j, s, Full{});
        top = ::max(s, top);
      }
      const V shrink = exp(before - top);
      V total = V::load(sum + j, Full{}) * shrink;
      for (int r = 0; r < count; ++r) {
        const V weight = exp(V::load(score + r * stride + j, Full{}) - top);
        V::store(score + r * stride + j, weight, Full{});
        total = total + weight;
      }
      V::store(max + j, top, Full{});
      V::store(sum + j, total, Full{});
      V::store(decay + j, shrink, Full{});
    }
  }
};

template <class R>
inline void fill(R* p, int64_t count, R value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

template <class V, class X>
void forward_as(const PoolProblem& p, RowRange range, PoolPart part) {
  using R = typename V::real;
  const auto scorer = table_of(p, p.dense_scorer, static_cast<const R*>(p.scorer) + range.sequence * p.scorer_stride);
  const auto pooled = table_of(p, p.full_output, static_cast<R*>(part.pooled));
  Softmax<V> softmax;
  alignas(64) R score[kBlock * kMaxPoolHeads];
  fill(softmax.max, stride<V>(p), R(-__builtin_inf()));
  fill(softmax.sum, stride<V>(p), R(0));
  fill(score, kBlock * stride<V>(p), R(0));
  fill(pooled.base, p.heads * pooled.size, R(0));
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const Block<X> block = block_at<X>(p, begin, range.end);
    score_rows<V, kScoreRows>(block.row, block.count, p.heads, scorer, score, stride<V>(p));
    softmax.add(score, block.count, stride<V>(p), static_cast<R>(p.scale));
    for (int64_t j = 0; begin != range.begin && j < p.heads; ++j)
      if (softmax.decay[j] != 1) scale_row<V>(pooled.base + j * pooled.size, pooled.size, softmax.decay[j]);
    sum_block<V>(p, block, score, pooled);
  }
  for (int64_t j = 0; j < p.heads; ++j) {
    static_cast<R*>(part.max)[j] = softmax.max[j];
    static_cast<R*>(part.sum)[j] = softmax.sum[j];
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

// The gradient of a block's scores: weights and their gradients, as products with the scorer and dpooled, in; out come
// alpha and dscore = alpha (dalpha - mean) scale.
template <class V>
void score_gradients(const typename V::real* max, const typename V::real* inverse, const typename V::real* mean,
                     typename V::real scale, int count, int64_t stride, typename V::real* alpha,
                     typename V::real* dscore) {
  for (int r = 0; r < count; ++r, alpha += stride, dscore += stride)
    for (int64_t j = 0; j < stride; j += V::kWidth) {
      // Rounded as where the maximum was taken: in a sequence of one token, the weight is exactly 1.
      const V score = rounded_product(V::load(alpha + j, Full{}), V::set(scale));
      const V a = exp(score - V::load(max + j, Full{})) * V::load(inverse + j, Full{});
      const V centered = V::load(dscore + j, Full{}) - V::load(mean + j, Full{});
      V::store(alpha + j, a, Full{});
      V::store(dscore + j, a * centered * V::set(scale), Full{});
    }
}

// sums[r, c] += sum_j weight[r, j] table_j over all heads of a dense table, the head's own row of another.
template <class V, int C, class Part>
inline void add_rows(V (&sums)[kOutRows][C], const typename V::real* weight, int64_t stride, int64_t heads,
                     const typename V::real* table, int64_t size, Part part) {
  for (int64_t j = 0; j < heads; ++j, ++weight, table += size) {
    V w[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) w[c] = V::load(table + c * V::kWidth, part);
#pragma GCC unroll 8
    for (int r = 0; r < kOutRows; ++r) {
      const V factor = V::set(weight[r * stride]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = fma(factor, w[c], sums[r][c]);
    }
  }
}

// dx_r (+)= sum_j alpha[r, j] dpooled_j + dscore[r, j] scorer_j for the rows of a block.
template <class V, class X>
void store_input_gradients(const PoolProblem& p, bool accumulate, int64_t begin, int count,
                           Table<const typename V::real> scorer, Table<const typename V::real> dpooled,
                           const typename V::real* alpha, const typename V::real* dscore, void* dx) {
  const int64_t step = stride<V>(p);
  const auto add = [&](auto& sums, const typename V::real* weight, int64_t head, int64_t offset, auto table,
                       auto part) {
    const bool shared = table.x_step == 0;
    add_rows<V>(sums, shared ? weight : weight + head, step, shared ? p.heads : 1,
                table.base + (shared ? head * p.head_dim : head * table.size) + offset, table.size, part);
  };
  for (int r = 0; r < count; r += kOutRows)
    for (int64_t head = 0; head < p.heads; ++head)
      for_groups<V, kOutVectors>(p.head_dim, [&](int64_t i, auto vectors, auto part) {
        constexpr int C = decltype(vectors)::value;
        X* out = static_cast<X*>(dx) + (begin + r) * p.width + head * p.head_dim + i;
        V sums[kOutRows][C];
#pragma GCC unroll 8
        for (int k = 0; k < kOutRows; ++k)
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c)
            sums[k][c] = accumulate && r + k < count ? V::load(out + k * p.width + c * V::kWidth, part) : V::set(0);
        add(sums, dscore + r * step, head, i, scorer, part);
        add(sums, alpha + r * step, head, i, dpooled, part);
        for (int k = 0; k < kOutRows && r + k < count; ++k)
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) V::store(out + k * p.width + c * V::kWidth, sums[k][c], part);
      });
}

template <class V, class X>
void backward_as(const PoolProblem& p, const PoolGradient& g, RowRange range, void* dscorer) {
  using R = typename V::real;
  const int64_t out_width = p.full_output ? p.width : p.head_dim, sequence = range.sequence * p.heads * out_width;
  const auto scorer = table_of(p, p.dense_scorer, static_cast<const R*>(p.scorer) + range.sequence * p.scorer_stride);
  const auto dpooled = table_of(p, p.full_output, static_cast<const R*>(g.dpooled) + sequence);
  const R* softmax = static_cast<const R*>(g.softmax) + range.sequence * 2 * p.heads;
  const R* pooled = static_cast<const R*>(g.pooled) + sequence;
  alignas(64) R alpha[kBlock * kMaxPoolHeads], dscore[kBlock * kMaxPoolHeads];
  alignas(64) R max[kMaxPoolHeads], inverse[kMaxPoolHeads], mean[kMaxPoolHeads];
  fill(alpha, kBlock * stride<V>(p), R(0));
  fill(dscore, kBlock * stride<V>(p), R(0));
  fill(max, stride<V>(p), R(0));
  fill(inverse, stride<V>(p), R(0));
  fill(mean, stride<V>(p), R(0));
  // sum_t alpha dalpha, because sum_t alpha x_t is the pooled row. Summed as dalpha is: where one token has all the weight
  // the two cancel exactly, as they must before they meet a large scorer.
  score_rows<V, 1>(&pooled, 1, p.heads, Table<const R>{dpooled.base, out_width, out_width}, mean, stride<V>(p));
  for (int64_t j = 0; j < p.heads; ++j) {
    max[j] = softmax[j];
    inverse[j] = 1 / softmax[p.heads + j];
  }
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const Block<X> block = block_at<X>(p, begin, range.end);
    score_rows<V, kScoreRows>(block.row, block.count, p.heads, scorer, alpha, stride<V>(p));
    score_rows<V, kScoreRows>(block.row, block.count, p.heads, dpooled, dscore, stride<V>(p));
    score_gradients<V>(max, inverse, mean, static_cast<R>(p.scale), block.count, stride<V>(p), alpha, dscore);
    sum_block<V>(p, block, dscore, table_of(p, p.dense_scorer, static_cast<R*>(dscorer)));
    store_input_gradients<V, X>(p, g.accumulate, begin, block.count, scorer, dpooled, alpha, dscore, g.dx);
  }
}

// y_t = x_t o gate of the sequence.
template <class V, class X>
void gate_as(const GateProblem& g, RowRange range) {
  const auto* gate = static_cast<const typename V::real*>(g.gate) + range.sequence * g.width;
  for (int64_t row = range.begin; row < range.end; ++row) {
    const X* x = static_cast<const X*>(g.x) + row * g.width;
    X* y = static_cast<X*>(g.y) + row * g.width;
    for_each<V>(g.width,
                [&](int64_t i, auto part) { V::store(y + i, V::load(x + i, part) * V::load(gate + i, part), part); });
  }
}

// dgate += sum_t dy_t o x_t; y_t = dy_t o gate is the gradient of x.
template <class V, class X>
void gate_backward_as(const GateProblem& g, RowRange range, void* dgate) {
  using R = typename V::real;
  for (int64_t row = range.begin; row < range.end; ++row) {
    const X *x = static_cast<const X*>(g.x) + row * g.width, *dy = static_cast<const X*>(g.dy) + row * g.width;
    for_each<V>(g.width, [&](int64_t i, auto part) {
      R* sum = static_cast<R*>(dgate) + i;
      V::store(sum, fma(V::load(x + i, part), V::load(dy + i, part), V::load(sum, part)), part);
    });
  }
  GateProblem transposed = g;
  transposed.x = g.dy;
  gate_as<V, X>(transposed, range);
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

void gate(const GateProblem& g, RowRange range) {
  with_types(g.x_dtype, [&](auto v, auto x) { gate_as<decltype(v), decltype(x)>(g, range); });
}

void gate_backward(const GateProblem& g, RowRange range, void* dgate) {
  with_types(g.x_dtype, [&](auto v, auto x) { gate_backward_as<decltype(v), decltype(x)>(g, range, dgate); });
}

}  // namespace

namespace hbert {
namespace HBERT_LEVEL {
extern const PoolKernels kPool = {forward, merge, backward, gate, gate_backward};
}
}  // namespace hbert
