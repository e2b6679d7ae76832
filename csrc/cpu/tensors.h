// Small helpers over torch's stable ABI for the op implementations.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>

#include "level.h"

namespace hbert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float64 on a CPU");
  }
}

// The dtype of statistics and parameters inside the kernels.
inline ScalarType compute_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline size_t compute_size(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

// The table of a kernel's functions for a dtype, out of one per level: float64 has scalar code only.
template <class Table, int N>
const Table& table_for(DType dtype, const Table* const (&tables)[N]) {
  return *tables[dtype == DType::kFloat64 ? 0 : level_index()];
}

// torch's own new_empty and contiguous go through the dispatcher, which costs more than a kernel on few rows.
inline Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t strides[4], stride = 1;
  STD_TORCH_CHECK(sizes.size() <= 4, "hbert_kernels: tensors have at most 4 dimensions");
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which the headers of torch 2.10 lack.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor allocate_like(const Tensor& t) { return allocate(t.sizes(), t.scalar_type()); }

// memset, but for no bytes the address may be null.
inline void clear(void* memory, size_t bytes) {
  if (bytes > 0) std::memset(memory, 0, bytes);
}

inline Tensor allocate_zeros(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  const Tensor t = allocate(sizes, dtype);
  clear(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

inline Tensor as_dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Scratch memory of the calling thread, kept between calls, so that no call pays for fresh pages. One user per slot at a
// time: kCall for what lives as long as the op's call, kTask for what a task of its parallel loop needs (the calling thread
// runs tasks too).
enum class Slot { kCall, kTask };

template <Slot slot>
inline char* workspace(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, rounded));
    capacity = memory ? rounded : 0;
    STD_TORCH_CHECK(memory != nullptr, "hbert_kernels: out of memory for a workspace of ", bytes, " bytes");
  }
  return static_cast<char*>(memory.get());
}

// Rows per task of a parallel loop: a task of some 16k elements outweighs the cost of handing it out.
inline int64_t row_grain(int64_t width) { return 16384 / width + 1; }

}  // namespace hbert
