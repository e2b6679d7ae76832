// Small helpers over torch's stable ABI for the CUDA ops.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <dlfcn.h>

#include <optional>

#include "kernels.h"

namespace hbert {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a call needs of the tensors' device: it is the current one as long as this lives, and kernels go to torch's
// stream.
class OnDevice {
 public:
#if defined(HBERT_CUDA_ON_CPU)
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  // Looked up by name: the function is in torch's CUDA library, which this one must not need on a machine without
  // it.
  void* stream() const {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto current = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(current != nullptr, "hbert_kernels: this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16 in the CUDA kernels");
  }
}

// On the device of `like`. torch's own new_empty goes through the dispatcher, which costs more than it does.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t strides[4], stride = 1;
  STD_TORCH_CHECK(sizes.size() <= 4, "hbert_kernels: tensors have at most 4 dimensions");
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor as_dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor as_dense(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(as_dense(*t)) : t; }

// The gradient of a parameter; an empty tensor for none.
inline Tensor gradient_like(const Tensor& x, const OptionalTensor& parameter) {
  return parameter.has_value() ? allocate(x, parameter->sizes(), parameter->scalar_type())
                               : allocate(x, {0}, x.scalar_type());
}

inline Values values_of(const Tensor& t, const char* op, const char* name) {
  return {t.const_data_ptr(), dtype_of(t, op, name)};
}

inline Values values_of(const OptionalTensor& t, const char* op, const char* name) {
  return t.has_value() ? values_of(*t, op, name) : Values{nullptr, DType::kFloat32};
}

// Null for the empty gradient of a parameter that is not there.
inline MutableValues mutable_values_of(const Tensor& t, const char* op, const char* name) {
  return {t.numel() > 0 ? t.mutable_data_ptr() : nullptr, dtype_of(t, op, name)};
}

inline const float* floats_of(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* mutable_floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline void check_rows(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, op, ": x must be [rows, width]");
}

inline void check_same_shape(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1), op, ": ", name,
                  " must have the shape of x");
}

inline void check_count(const OptionalTensor& t, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(!t.has_value() || t->numel() == count, op, ": ", name, " must have ", count, " values");
}

// `cu_seqlens` must be dense. Its values are not read here: that would wait for the device.
inline Packing packing_of(const Tensor& cu_seqlens, const Tensor& x, const char* op) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.scalar_type() == ScalarType::Int, op,
                  ": cu_seqlens must be int32 [B+1]");
  return {static_cast<const int32_t*>(cu_seqlens.const_data_ptr()), cu_seqlens.size(0) - 1, x.size(0)};
}

inline void check_launch(int code, const char* op) {
  STD_TORCH_CHECK(code == 0, op, ": a CUDA kernel could not be launched: ", hbert_cuda_error(code));
}

}  // namespace cuda
}  // namespace hbert

// The compiled ops stand in a library of their own, with the schemas of hbert_kernels.
#if defined(HBERT_CUDA_ON_CPU)
#define HBERT_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(hbert_kernels_cuda, CPU, m)
#else
#define HBERT_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(hbert_kernels_cuda, CUDA, m)
#endif
