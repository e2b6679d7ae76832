// The ops of additive pooling on CUDA: checks, allocation, launches.
#include <tuple>

#include "tensors.h"

namespace hbert {
namespace cuda {
namespace {

// All but the work memory; the tensors must be dense and outlive the call. The scorer may be [h, H] or [h, d], or
// one of them for each sequence.
Pool describe(const Tensor& x, const Tensor& scorer, const Tensor& cu_seqlens, int64_t heads, bool full, double scale,
              const char* op) {
  check_rows(x, op);
  const int64_t width = x.size(1), sequences = cu_seqlens.size(0) - 1, last = scorer.size(scorer.dim() - 1);
  STD_TORCH_CHECK(heads >= 1 && heads <= kMaxPoolHeads && width % heads == 0, op,
                  ": heads must divide the width and be at most ", kMaxPoolHeads);
  const bool shared = scorer.dim() == 2 && scorer.size(0) == heads;
  const bool own = scorer.dim() == 3 && scorer.size(0) == sequences && scorer.size(1) == heads;
  STD_TORCH_CHECK((shared || own) && (last == width || last == width / heads), op,
                  ": scorer must be [h, H] or [h, d], or one of them for each sequence");
  return {packing_of(cu_seqlens, x, op),
          static_cast<int32_t>(width),
          static_cast<int32_t>(heads),
          last == width,
          full,
          static_cast<float>(scale),
          dtype_of(x, op, "x"),
          x.const_data_ptr(),
          floats_of(scorer, op, "scorer"),
          own ? heads * last : 0,
          nullptr};
}

std::tuple<Tensor, Tensor> additive_pool(const Tensor& x, const Tensor& scorer, const Tensor& cu_seqlens, int64_t heads,
                                         bool full, double scale) {
  const char* op = "additive_pool";
  const OnDevice device(x);
  const Tensor dense = as_dense(x), dense_scorer = as_dense(scorer), bounds = as_dense(cu_seqlens);
  PoolForward args{describe(dense, dense_scorer, bounds, heads, full, scale, op), nullptr, nullptr};
  const int64_t sequences = args.pool.packing.sequences, width = x.size(1);
  const Tensor pooled = full ? allocate(x, {sequences, heads, width}, ScalarType::Float)
                             : allocate(x, {sequences, width}, ScalarType::Float);
  const Tensor softmax = allocate(x, {sequences, 2, heads}, ScalarType::Float);
  const Tensor partial = allocate(x, {hbert_cuda_pool_partial(&args.pool, false)}, ScalarType::Float);
  args.pool.partial = mutable_floats_of(partial);
  args.pooled = mutable_floats_of(pooled);
  args.softmax = mutable_floats_of(softmax);
  check_launch(hbert_cuda_pool_forward(&args, device.stream()), op);
  return {pooled, softmax};
}

std::tuple<Tensor, Tensor> additive_pool_backward(const Tensor& dpooled, const Tensor& x, const Tensor& scorer,
                                                  const Tensor& cu_seqlens, const Tensor& pooled, const Tensor& softmax,
                                                  int64_t heads, bool full, double scale) {
  const char* op = "additive_pool_backward";
  const OnDevice device(x);
  const Tensor dense = as_dense(x), dense_scorer = as_dense(scorer), bounds = as_dense(cu_seqlens);
  const Tensor dense_pooled = as_dense(pooled), dense_dpooled = as_dense(dpooled), dense_softmax = as_dense(softmax);
  PoolBackward args{};
  args.pool = describe(dense, dense_scorer, bounds, heads, full, scale, op);
  const int64_t values = args.pool.packing.sequences * x.size(1) * (full ? heads : 1);
  check_count(dense_pooled, values, op, "pooled");
  check_count(dense_dpooled, values, op, "dpooled");
  check_count(dense_softmax, args.pool.packing.sequences * 2 * heads, op, "softmax");
  const Tensor dx = allocate(x, x.sizes(), x.scalar_type()), dscorer = allocate(x, scorer.sizes(), ScalarType::Float);
  const Tensor partial = allocate(x, {hbert_cuda_pool_partial(&args.pool, true)}, ScalarType::Float);
  args.pool.partial = mutable_floats_of(partial);
  args.pooled = floats_of(dense_pooled, op, "pooled");
  args.softmax = floats_of(dense_softmax, op, "softmax");
  args.dpooled = floats_of(dense_dpooled, op, "dpooled");
  args.dx = dx.mutable_data_ptr();
  args.dscorer = mutable_floats_of(dscorer);
  check_launch(hbert_cuda_pool_backward(&args, device.stream()), op);
  return {dx, dscorer};
}

}  // namespace

HBERT_IMPLEMENTATIONS(m) {
  m.impl("additive_pool", TORCH_BOX(&additive_pool));
  m.impl("additive_pool_backward", TORCH_BOX(&additive_pool_backward));
}

}  // namespace cuda
}  // namespace hbert
