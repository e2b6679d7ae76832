// The ops that others are made of, as C++ functions; arguments and results as in their schemas.
#pragma once
#include <optional>
#include <tuple>

#include "sequences.h"

namespace hbert {

std::tuple<Tensor, Tensor> additive_pool(const Tensor& x, const Tensor& scorer, const Tensor& cu_seqlens, int64_t heads,
                                         bool full, double scale);

std::tuple<Tensor, Tensor> additive_pool_backward(const Tensor& dpooled, const Tensor& x, const Tensor& scorer,
                                                  const Tensor& cu_seqlens, const Tensor& pooled, const Tensor& softmax,
                                                  int64_t heads, bool full, double scale);

// The same, adding to dx, which is dense and has the shape and dtype of x; returns dscorer.
Tensor additive_pool_backward_into(const Tensor& dx, bool accumulate, const Tensor& dpooled, const Tensor& x,
                                   const Tensor& scorer, const Tensor& cu_seqlens, const Tensor& pooled,
                                   const Tensor& softmax, int64_t heads, bool full, double scale);

// x_t o gate of the sequence, and its backward: dx and dgate.
Tensor gate_rows(const Tensor& x, const Tensor& gate, const Tensor& cu_seqlens);
std::tuple<Tensor, Tensor> gate_rows_backward(const Tensor& dy, const Tensor& x, const Tensor& gate,
                                              const Tensor& cu_seqlens);

std::tuple<Tensor, Tensor, Tensor> gated_layer_norm(const Tensor& x, const Tensor& gate, const Tensor& cu_seqlens,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                                     const Tensor& gate, const Tensor& cu_seqlens,
                                                                     const Tensor& mean, const Tensor& rstd,
                                                                     const std::optional<Tensor>& weight,
                                                                     const std::optional<Tensor>& bias);

using AdditiveAttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AdditiveAttentionResult additive_attention(const Tensor& query, const Tensor& x, const Tensor& query_att,
                                           const Tensor& key_att, const Tensor& cu_seqlens, int64_t heads,
                                           const std::optional<Tensor>& key_weight,
                                           const std::optional<Tensor>& key_bias, bool key_free,
                                           const std::optional<Tensor>& norm_weight,
                                           const std::optional<Tensor>& norm_bias, bool sub_norm, double eps);

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                                     int64_t num_heads);

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double eps);

std::tuple<Tensor, Tensor, Tensor> conv_layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, const Tensor& conv_weight,
                                                   const Tensor& cu_seqlens, double eps);

std::tuple<Tensor, Tensor, Tensor> activation_layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& bias, double eps,
                                                         int64_t activation, const std::optional<Tensor>& input_bias);

std::tuple<Tensor, Tensor, Tensor> layer_norm_int8(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps, bool keep);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_int8(const Tensor& x, const Tensor& residual,
                                                               const std::optional<Tensor>& weight,
                                                               const std::optional<Tensor>& bias, double eps,
                                                               bool keep);

std::tuple<Tensor, Tensor, Tensor> conv_layer_norm_int8(const Tensor& x, const std::optional<Tensor>& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& conv_weight,
                                                        const Tensor& cu_seqlens, double eps, bool keep);

std::tuple<Tensor, Tensor> activation_layer_norm_int8(const Tensor& x, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps, int64_t activation,
                                                      const std::optional<Tensor>& input_bias);

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, std::optional<int64_t> activation);

Tensor int8_linear(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_start,
                   const Tensor& weight_scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& other,
                   ScalarType out_dtype);

Tensor packed_linear(const Tensor& x, const Tensor& weight, int64_t columns, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& other, std::optional<int64_t> activation);

// x [M, K] b [K, N], dense, float32.
Tensor row_product(const Tensor& x, const Tensor& b);

}  // namespace hbert
