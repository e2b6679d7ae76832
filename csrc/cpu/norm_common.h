// What the ops over rows share on the torch side: shapes, parameters in the compute type, activations, sums over blocks of rows.
#pragma once
#include <algorithm>
#include <cstring>

#include "row_norm.h"
#include "tensors.h"

namespace hbert {

struct Rows {
  int64_t count, width;
};

inline Rows check_rows(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, op, ": x must be [rows, width]");
  return {x.size(0), x.size(1)};
}

inline void check_shape(const Tensor& t, int64_t rows, int64_t width, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == width, op, ": ", name, " must be [", rows, ", ",
                  width, "]");
}

template <class R>
void widen_to(const Tensor& t, R* out, const char* op) {
  const Tensor dense = as_dense(t);
  const DType dtype = dtype_of(dense, op, "a parameter");
  STD_TORCH_CHECK((dtype == DType::kFloat64) == (sizeof(R) == sizeof(double)), op, ": float64 does not mix");
  const int64_t n = dense.numel();
  if (dtype != DType::kBFloat16) {
    std::memcpy(out, dense.const_data_ptr(), n * sizeof(R));
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(dense.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    out[i] = static_cast<R>(value);
  }
}

// A parameter of `shape` values in the compute type at `out`, or the fallback everywhere.
inline void copy_parameter(const std::optional<Tensor>& parameter, double fallback, int64_t count, DType dtype,
                           void* out, const char* op) {
  STD_TORCH_CHECK(!parameter.has_value() || parameter->numel() == count, op, ": a parameter must have ", count,
                  " values");
  auto fill = [&](auto* values) {
    using R = std::remove_reference_t<decltype(*values)>;
    if (parameter.has_value()) widen_to<R>(*parameter, values, op);
    else std::fill(values, values + count, static_cast<R>(fallback));
  };
  dtype == DType::kFloat64 ? fill(static_cast<double*>(out)) : fill(static_cast<float*>(out));
}

inline Activation activation_of(int64_t code, const char* op) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, op, ": activation must be 0 (gelu), 1 (gelu_tanh) or 2 (relu), got ", code);
  return static_cast<Activation>(code);
}

struct StatisticsTensors {
  Tensor mean, rstd;
};

inline StatisticsTensors new_statistics(int64_t rows, DType dtype) {
  return {allocate({rows}, compute_type(dtype)), allocate({rows}, compute_type(dtype))};
}

template <class Forward>
void put_statistics(Forward& args, const StatisticsTensors& statistics) {
  args.mean = statistics.mean.mutable_data_ptr();
  args.rstd = statistics.rstd.mutable_data_ptr();
}

// The outputs of a norm that quantises; y is empty unless it is kept.
struct Int8Outputs {
  Tensor values, scale, y;
};

// Sets them in the arguments, whose x_dtype is known.
template <class Forward>
Int8Outputs new_int8_outputs(Forward& args, Rows rows, ScalarType dtype, bool keep, const char* op) {
  STD_TORCH_CHECK(args.x_dtype != DType::kFloat64, op, ": x must be float32 or bfloat16");
  Int8Outputs out{allocate({rows.count, rows.width}, ScalarType::Char), allocate({rows.count}, ScalarType::Float),
                  keep ? allocate({rows.count, rows.width}, dtype) : allocate({0}, dtype)};
  args.int8 = {static_cast<int8_t*>(out.values.mutable_data_ptr()), static_cast<float*>(out.scale.mutable_data_ptr())};
  args.y = keep ? out.y.mutable_data_ptr() : nullptr;
  return out;
}

inline void check_statistics(const Tensor& mean, const Tensor& rstd, int64_t rows, DType dtype, const char* op) {
  for (const Tensor* t : {&mean, &rstd})
    STD_TORCH_CHECK(
        t->dim() == 1 && t->size(0) == rows && t->is_contiguous() && t->scalar_type() == compute_type(dtype), op,
        ": mean and rstd must be contiguous [rows] in the compute dtype");
}

inline Tensor new_gradient(const Tensor& x, const std::optional<Tensor>& parameter) {
  return parameter.has_value() ? allocate(parameter->sizes(), parameter->scalar_type())
                               : allocate({0}, x.scalar_type());
}

// Gradients of parameters are summed over fixed blocks of work, then over the blocks in order: the same bits for any number
// of threads. A block has `count` sums of the compute type.
class BlockSums {
 public:
  static constexpr int64_t kMaxBlocks = 64;

  BlockSums(char* memory, int64_t blocks, int64_t count, DType dtype)
      : memory_(memory), blocks_(blocks), count_(count), dtype_(dtype) {}

  static size_t bytes(int64_t blocks, int64_t count, DType dtype) { return blocks * count * compute_size(dtype); }

  // The block's sums, set to zero; called by the task that adds to them.
  char* start(int64_t block) {
    char* sums = memory_ + block * count_ * compute_size(dtype_);
    std::memset(sums, 0, count_ * compute_size(dtype_));
    return sums;
  }

  // The total of the sums from `offset` on, rounded into `gradient`; nothing for a gradient that nobody asked for.
  void finish(int64_t offset, const Tensor& gradient) {
    if (gradient.numel() == 0) return;
    dtype_ == DType::kFloat64 ? total<double>(offset, gradient) : total<float>(offset, gradient);
  }

 private:
  template <class R>
  void total(int64_t offset, Tensor gradient) {
    R* sums = reinterpret_cast<R*>(memory_) + offset;
    const int64_t n = gradient.numel();
    for (int64_t block = 1; block < blocks_; ++block)
      for (int64_t i = 0; i < n; ++i) sums[i] += sums[block * count_ + i];
    const Tensor source =
        torch::stable::from_blob(sums, gradient.sizes(), gradient.strides(), gradient.device(), compute_type(dtype_));
    torch::stable::copy_(gradient, source);
  }

  char* memory_;
  int64_t blocks_, count_;
  DType dtype_;
};

}  // namespace hbert
