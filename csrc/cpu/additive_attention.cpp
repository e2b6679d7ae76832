// The core of additive attention between the query projection and the transform: a driver over the kernels of additive_pool
// and gated_layer_norm, and torch's matrix products for what is left, which is small: one row per sequence and head.
//
// Shapes: B sequences, h heads, H hidden values, d = H / h. Tensors of sequences (g, the global query; key, the pooled key
// before its product with g) are in the compute dtype.
#include "ops.h"

namespace hbert {
namespace {

using torch::stable::matmul;

struct Core {
  int64_t sequences, heads, hidden, head_dim;
  bool dense;           // scorers [h, H], otherwise [h, d]
  bool key_free;        // no key: x is pooled
  ScalarType storage;   // of query and x
  ScalarType products;  // of what enters torch's matrix products
  DType dtype;
  double scale;

  int64_t scorer_width() const { return dense ? hidden : head_dim; }
};

Core describe(const Tensor& query, const Tensor& x, const Tensor& key_att, const Tensor& cu_seqlens, int64_t heads,
              const std::optional<Tensor>& key_weight, bool key_free, const char* op) {
  const Rows rows = check_rows(query, op);
  check_shape(x, rows.count, rows.width, op, "x");
  STD_TORCH_CHECK(x.scalar_type() == query.scalar_type(), op, ": x must have the dtype of query");
  STD_TORCH_CHECK(heads >= 1 && rows.width % heads == 0, op, ": heads must divide the width");
  const int64_t head_dim = rows.width / heads;
  STD_TORCH_CHECK(
      key_att.dim() == 2 && key_att.size(0) == heads && (key_att.size(1) == rows.width || key_att.size(1) == head_dim),
      op, ": key_att must be [h, H] or [h, d]");
  const DType dtype = dtype_of(query, op, "query");
  STD_TORCH_CHECK(key_att.scalar_type() == compute_type(dtype), op, ": key_att must have the compute dtype");
  if (key_weight.has_value()) check_shape(*key_weight, rows.width, rows.width, op, "key_weight");
  STD_TORCH_CHECK(key_weight.has_value() || !key_free, op, ": the K-free form needs key_weight");
  const bool widen = dtype == DType::kBFloat16 && !has_fast_bfloat16_products();
  return {cu_seqlens.size(0) - 1,
          heads,
          rows.width,
          head_dim,
          key_att.size(1) == rows.width,
          key_free,
          query.scalar_type(),
          widen ? ScalarType::Float : query.scalar_type(),
          dtype,
          1 / __builtin_sqrt(static_cast<double>(head_dim))};
}

Tensor cast(const Tensor& t, ScalarType dtype) {
  return as_dense(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// f(values of each tensor...) with pointers in the compute type.
template <class F, class... T>
void with_values(DType dtype, F f, const T&... tensors) {
  if (dtype == DType::kFloat64) return f(static_cast<double*>(tensors.mutable_data_ptr())...);
  f(static_cast<float*>(tensors.mutable_data_ptr())...);
}

// a o b, of equal shapes.
Tensor product(const Core& c, const Tensor& a, const Tensor& b) {
  const Tensor out = allocate_like(a);
  with_values(
      c.dtype,
      [n = a.numel()](auto* to, const auto* x, const auto* y) {
        for (int64_t i = 0; i < n; ++i) to[i] = x[i] * y[i];
      },
      out, a, b);
  return out;
}

// f(offset of a scorer, of what of g it meets, of its key_att, number of values) for every sequence and head.
template <class F>
void for_scorers(const Core& c, F f) {
  const int64_t width = c.scorer_width();
  for (int64_t s = 0; s < c.sequences; ++s)
    for (int64_t j = 0; j < c.heads; ++j)
      f((s * c.heads + j) * width, s * c.hidden + (c.dense ? 0 : j * c.head_dim), j * width, width);
}

// [B, h, H or d]: g o key_att_j, the scorer of a key that is not yet multiplied by g.
Tensor gated_scorers(const Core& c, const Tensor& g, const Tensor& key_att) {
  const Tensor out = allocate({c.sequences, c.heads, c.scorer_width()}, g.scalar_type());
  with_values(
      c.dtype,
      [&](auto* to, const auto* global, const auto* att) {
        for_scorers(c, [&](int64_t at, int64_t g_at, int64_t att_at, int64_t n) {
          for (int64_t i = 0; i < n; ++i) to[at + i] = global[g_at + i] * att[att_at + i];
        });
      },
      out, g, key_att);
  return out;
}

// dg += what comes through the gated scorers; returns the gradient of key_att.
Tensor gated_scorers_backward(const Core& c, const Tensor& dscorers, const Tensor& g, const Tensor& key_att,
                              const Tensor& dg) {
  const Tensor datt = allocate_zeros(key_att.sizes(), key_att.scalar_type());
  with_values(
      c.dtype,
      [&](const auto* from, const auto* global, const auto* att, auto* to_global, auto* to_att) {
        for_scorers(c, [&](int64_t at, int64_t g_at, int64_t att_at, int64_t n) {
          for (int64_t i = 0; i < n; ++i) {
            to_att[att_at + i] += from[at + i] * global[g_at + i];
            to_global[g_at + i] += from[at + i] * att[att_at + i];
          }
        });
      },
      dscorers, g, key_att, dg, datt);
  return datt;
}

Tensor heads_first(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1); }

// The key projection, and its products with [B, h, ...] rows of all heads at once or with each head's own slice.
struct KeyWeight {
  const Core& c;
  Tensor whole;   // [H, H]
  Tensor slices;  // [h, d, H]

  KeyWeight(const Core& core, const Tensor& key_weight)
      : c(core),
        whole(cast(key_weight, core.products)),
        slices(torch::stable::view(whole, {core.heads, core.head_dim, core.hidden})) {}

  Tensor rows(const Tensor& t) const { return torch::stable::view(t, {c.sequences * c.heads, c.hidden}); }
  Tensor compute(const Tensor& t) const { return cast(t, compute_type(c.dtype)); }

  // [B, h, d] -> [B, h, H]: each head through its slice.
  Tensor up(const Tensor& t) const { return compute(heads_first(matmul(heads_first(t), slices))); }
  // [B, h, H] -> [B, h, d]
  Tensor down(const Tensor& t) const { return compute(heads_first(matmul(heads_first(t), transposed(slices)))); }
  // The gradient of the weight through up(narrow) = wide or down(wide) = narrow.
  Tensor gradient(const Tensor& narrow, const Tensor& wide) const {
    return compute(matmul(transposed(heads_first(narrow)), heads_first(wide)));
  }

  // Scorers of x from those of the key.
  Tensor scorers(const Tensor& gated) const {
    if (!c.dense) return up(gated);
    // Without vectors, and in other dtypes, torch's is the faster one.
    const bool own = c.products == ScalarType::Float && level_index() > 0;
    const Tensor product = own ? row_product(rows(gated), whole) : matmul(rows(gated), whole);
    return torch::stable::view(compute(product), {c.sequences, c.heads, c.hidden});
  }
  Tensor scorers_backward(const Tensor& dscorers) const {
    if (!c.dense) return down(dscorers);
    return torch::stable::view(compute(matmul(rows(dscorers), transposed(whole))), {c.sequences, c.heads, c.hidden});
  }
  Tensor scorers_gradient(const Tensor& gated, const Tensor& dscorers) const {
    if (!c.dense) return gradient(gated, dscorers);
    return compute(matmul(transposed(rows(gated)), rows(dscorers)));
  }
};

// The rows of t before the dead ones: a library's product must not meet what stands in those.
Tensor alive(const Tensor& t, const Tensor& cu_seqlens, const char* op) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, 0, split_sequences(cu_seqlens, t.size(0), op).num_rows);
}

// x Wk^T + bk, zero in dead rows.
Tensor project_key(const Core& c, const Tensor& x, const Tensor& key_weight, const std::optional<Tensor>& key_bias,
                   const Tensor& cu_seqlens, const char* op) {
  std::optional<Tensor> bias;
  if (key_bias.has_value()) bias = cast(*key_bias, c.products);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(cast(alive(x, cu_seqlens, op), c.products)),
                                    torch::stable::detail::from(cast(key_weight, c.products)),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor key = torch::stable::detail::to<Tensor>(stack[0]);
  if (key.size(0) == x.size(0)) return key;
  const Tensor padded = allocate_zeros(x.sizes(), c.products);
  Tensor living = alive(padded, cu_seqlens, op);
  torch::stable::copy_(living, key);
  return padded;
}

// t [B, H] += bias [H] for every sequence.
void add_bias(const Core& c, const Tensor& t, const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return;
  with_values(
      c.dtype,
      [&](auto* to, const auto* b) {
        for (int64_t s = 0; s < c.sequences; ++s)
          for (int64_t i = 0; i < c.hidden; ++i) to[s * c.hidden + i] += b[i];
      },
      t, cast(*bias, compute_type(c.dtype)));
}

Tensor sum_of_rows(const Core& c, const Tensor& t) {
  const int64_t rows = 0;
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1), false, compute_type(c.dtype));
}

Tensor none(const Tensor& like) { return allocate({0}, like.scalar_type()); }

// `total` in the place of the parameter's gradient; empty for none.
Tensor gradient_of(const Tensor& x, const std::optional<Tensor>& parameter, const Tensor& total) {
  if (!parameter.has_value()) return none(x);
  return cast(torch::stable::view(total, parameter->sizes()), parameter->scalar_type());
}

}  // namespace

// out, and what the backward needs: g [B, H], the softmax of the query pooling, the scorers of the second pooling, its
// result and its softmax, key (in the direct form it is that result), mean and rstd of the norm [T].
AdditiveAttentionResult additive_attention(const Tensor& query, const Tensor& x, const Tensor& query_att,
                                           const Tensor& key_att, const Tensor& cu_seqlens, int64_t heads,
                                           const std::optional<Tensor>& key_weight,
                                           const std::optional<Tensor>& key_bias, bool key_free,
                                           const std::optional<Tensor>& norm_weight,
                                           const std::optional<Tensor>& norm_bias, bool sub_norm, double eps) {
  const char* op = "additive_attention";
  const Core c = describe(query, x, key_att, cu_seqlens, heads, key_weight, key_free, op);
  const auto [g, query_softmax] = additive_pool(query, query_att, cu_seqlens, heads, false, c.scale);
  Tensor scorers = gated_scorers(c, g, as_dense(key_att)), pooled, softmax, key;
  if (key_free) {
    const KeyWeight weight(c, *key_weight);
    scorers = weight.scorers(cast(scorers, c.products));
    std::tie(pooled, softmax) = additive_pool(x, scorers, cu_seqlens, heads, true, c.scale);
    key = torch::stable::view(weight.down(cast(pooled, c.products)), {c.sequences, c.hidden});
    add_bias(c, key, key_bias);
  } else {
    const Tensor keys = key_weight.has_value() ? project_key(c, x, *key_weight, key_bias, cu_seqlens, op) : x;
    std::tie(pooled, softmax) = additive_pool(keys, scorers, cu_seqlens, heads, false, c.scale);
    key = none(g);
  }
  const Tensor gate = product(c, g, key_free ? key : pooled);
  if (!sub_norm)
    return {gate_rows(query, gate, cu_seqlens), g, query_softmax, scorers, pooled, softmax, key, none(g), none(g)};
  const auto [out, mean, rstd] = gated_layer_norm(query, gate, cu_seqlens, norm_weight, norm_bias, eps);
  return {out, g, query_softmax, scorers, pooled, softmax, key, mean, rstd};
}

namespace {

struct KeyGradients {
  Tensor dx, dscorers, dweight, dbias;  // dscorers: of the gated scorers
};

KeyGradients key_free_backward(const Core& c, const Tensor& dkey, const Tensor& x, const Tensor& key_weight,
                               const Tensor& gated, const Tensor& scorers, const Tensor& pooled, const Tensor& softmax,
                               const Tensor& cu_seqlens) {
  const KeyWeight weight(c, key_weight);
  const Tensor narrow = torch::stable::view(cast(dkey, c.products), {c.sequences, c.heads, c.head_dim});
  const Tensor dweight = torch::stable::view(weight.gradient(narrow, cast(pooled, c.products)), {c.hidden, c.hidden});
  const auto [dx, dscorers] =
      additive_pool_backward(weight.up(narrow), x, scorers, cu_seqlens, pooled, softmax, c.heads, true, c.scale);
  const Tensor rounded = cast(dscorers, c.products);
  const Tensor more = weight.scorers_gradient(cast(gated, c.products), rounded);
  with_values(
      c.dtype,
      [n = dweight.numel()](auto* to, const auto* from) {
        for (int64_t i = 0; i < n; ++i) to[i] += from[i];
      },
      dweight, more);
  return {dx, weight.scorers_backward(rounded), dweight, sum_of_rows(c, dkey)};
}

KeyGradients direct_backward(const Core& c, const Tensor& dkey, const Tensor& x,
                             const std::optional<Tensor>& key_weight, const std::optional<Tensor>& key_bias,
                             const Tensor& scorers, const Tensor& pooled, const Tensor& softmax,
                             const Tensor& cu_seqlens) {
  const char* op = "additive_attention_backward";
  const Tensor keys = key_weight.has_value() ? project_key(c, x, *key_weight, key_bias, cu_seqlens, op) : x;
  const auto [dkeys, dscorers] =
      additive_pool_backward(dkey, keys, scorers, cu_seqlens, pooled, softmax, c.heads, false, c.scale);
  if (!key_weight.has_value()) return {dkeys, dscorers, {}, {}};
  const Tensor dweight = matmul(transposed(alive(dkeys, cu_seqlens, op)), cast(alive(x, cu_seqlens, op), c.products));
  return {cast(matmul(dkeys, cast(*key_weight, c.products)), c.storage), dscorers, dweight, sum_of_rows(c, dkeys)};
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of query, x, query_att, key_att, key_weight, key_bias, norm_weight and norm_bias; empty for what is not there.
BackwardResult additive_attention_backward(const Tensor& dout, const Tensor& query, const Tensor& x,
                                           const Tensor& query_att, const Tensor& key_att, const Tensor& cu_seqlens,
                                           int64_t heads, const std::optional<Tensor>& key_weight,
                                           const std::optional<Tensor>& key_bias, bool key_free,
                                           const std::optional<Tensor>& norm_weight,
                                           const std::optional<Tensor>& norm_bias, bool sub_norm, const Tensor& g,
                                           const Tensor& query_softmax, const Tensor& scorers, const Tensor& pooled,
                                           const Tensor& softmax, const Tensor& projected, const Tensor& mean,
                                           const Tensor& rstd) {
  const Core c = describe(query, x, key_att, cu_seqlens, heads, key_weight, key_free, "additive_attention_backward");
  const Tensor& key = key_free ? projected : pooled;
  const Tensor gate = product(c, g, key), att = as_dense(key_att);
  Tensor dquery, dgate, dnorm_weight, dnorm_bias;
  if (sub_norm) {
    std::tie(dquery, dgate, dnorm_weight, dnorm_bias) =
        gated_layer_norm_backward(dout, query, gate, cu_seqlens, mean, rstd, norm_weight, norm_bias);
  } else {
    std::tie(dquery, dgate) = gate_rows_backward(dout, query, gate, cu_seqlens);
    dnorm_weight = none(x);
    dnorm_bias = none(x);
  }
  const Tensor dkey = product(c, dgate, g), dg = product(c, dgate, key);
  const KeyGradients d =
      key_free
          ? key_free_backward(c, dkey, x, *key_weight, gated_scorers(c, g, att), scorers, pooled, softmax, cu_seqlens)
          : direct_backward(c, dkey, x, key_weight, key_bias, scorers, pooled, softmax, cu_seqlens);
  const Tensor dkey_att = gated_scorers_backward(c, d.dscorers, g, att, dg);
  const Tensor dquery_att = additive_pool_backward_into(dquery, true, dg, query, query_att, cu_seqlens, g,
                                                        query_softmax, heads, false, c.scale);
  return {dquery,
          d.dx,
          dquery_att,
          dkey_att,
          gradient_of(x, key_weight, d.dweight),
          gradient_of(x, key_bias, d.dbias),
          dnorm_weight,
          dnorm_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("additive_attention", TORCH_BOX(&additive_attention));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
}

}  // namespace hbert
