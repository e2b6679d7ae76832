// The ops that additive_attention is made of, as C++ functions; arguments and results as in their schemas.
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

// x [M, K] b [K, N], dense, float32.
Tensor row_product(const Tensor& x, const Tensor& b);

}  // namespace hbert
