// The launchers of csrc/cuda for NumPy arrays: a Python module for tests, linked with kernels that were compiled
// for the shim. NumPy has no bfloat16: arrays of uint16 are taken for its bits. Every function returns the
// launcher's cudaError_t.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../cuda/kernels.h"

extern "C" void hbert_shim_seed(uint64_t value);

namespace py = pybind11;
using namespace hbert::cuda;

namespace {

using Array = std::optional<py::array>;

DType dtype_of(const py::array& a) {
  switch (a.dtype().char_()) {
    case 'f': return DType::kFloat32;
    case 'e': return DType::kFloat16;
    case 'H': return DType::kBFloat16;
  }
  throw py::type_error("arrays must be float32, float16 or uint16 (bfloat16 bits)");
}

template <class T = void>
T* data_of(const Array& a) {
  if (!a) return nullptr;
  if (!(a->flags() & py::array::c_style)) throw py::value_error("arrays must be contiguous");
  return static_cast<T*>(const_cast<void*>(a->data()));
}

Values values_of(const Array& a) { return {data_of(a), a ? dtype_of(*a) : DType::kFloat32}; }
MutableValues mutable_values_of(const Array& a) { return {data_of(a), a ? dtype_of(*a) : DType::kFloat32}; }

Packing packing_of(const Array& cu_seqlens, const py::array& x) {
  return {data_of<const int32_t>(cu_seqlens), cu_seqlens ? cu_seqlens->shape(0) - 1 : 0, x.shape(0)};
}

int row_norm_forward(int source, int activation, double eps, const py::array& x, const Array& residual,
                     const Array& total, const Array& input_bias, const Array& gate, const Array& cu_seqlens,
                     const Array& weight, const Array& bias, const Array& y, const Array& mean, const Array& rstd) {
  const RowNormForward args{static_cast<RowSource>(source),
                            static_cast<Activation>(activation),
                            packing_of(cu_seqlens, x),
                            static_cast<int32_t>(x.shape(1)),
                            static_cast<float>(eps),
                            dtype_of(x),
                            data_of(x),
                            values_of(residual),
                            mutable_values_of(total),
                            values_of(input_bias),
                            data_of<const float>(gate),
                            values_of(weight),
                            values_of(bias),
                            data_of(y),
                            data_of<float>(mean),
                            data_of<float>(rstd),
                            false};
  return hbert_cuda_row_norm_forward(&args, nullptr);
}

RowNormBackward row_norm_arguments(int source, int activation, const Array& dy, const Array& dtotal, const py::array& x,
                                   const Array& input_bias, const Array& gate, const Array& cu_seqlens,
                                   const Array& mean, const Array& rstd, const Array& weight, const Array& dx,
                                   const Array& dweight, const Array& dbias, const Array& dsource) {
  return {static_cast<RowSource>(source),
          static_cast<Activation>(activation),
          packing_of(cu_seqlens, x),
          static_cast<int32_t>(x.shape(1)),
          dtype_of(x),
          values_of(dy),
          data_of(dtotal),
          data_of(x),
          values_of(input_bias),
          data_of<const float>(gate),
          data_of<const float>(mean),
          data_of<const float>(rstd),
          values_of(weight),
          data_of(dx),
          mutable_values_of(dweight),
          mutable_values_of(dbias),
          mutable_values_of(dsource),
          nullptr,
          false};
}

// Work memory is malloc'ed by NumPy, so that the address sanitizer knows its ends.
py::array_t<float> work_memory(int64_t values) {
  py::array_t<float> memory(values);
  std::fill(memory.mutable_data(), memory.mutable_data() + values, __builtin_nanf(""));
  return memory;
}

template <class... Arrays>
int row_norm_backward(int source, int activation, Arrays... arrays) {
  RowNormBackward args = row_norm_arguments(source, activation, arrays...);
  py::array_t<float> partial = work_memory(hbert_cuda_row_norm_partial(&args));
  args.partial = partial.mutable_data();
  return hbert_cuda_row_norm_backward(&args, nullptr);
}

Pool pool_of(const py::array& x, const py::array& scorer, const Array& cu_seqlens, int heads, bool full, double scale) {
  const int64_t width = x.shape(1), last = scorer.shape(scorer.ndim() - 1);
  return {packing_of(cu_seqlens, x),
          static_cast<int32_t>(width),
          heads,
          last == width,
          full,
          static_cast<float>(scale),
          dtype_of(x),
          data_of(x),
          data_of<const float>(scorer),
          scorer.ndim() == 3 ? heads * last : 0,
          nullptr};
}

int pool_forward(const py::array& x, const py::array& scorer, const Array& cu_seqlens, int heads, bool full,
                 double scale, const Array& pooled, const Array& softmax) {
  PoolForward args{pool_of(x, scorer, cu_seqlens, heads, full, scale), data_of<float>(pooled), data_of<float>(softmax)};
  py::array_t<float> partial = work_memory(hbert_cuda_pool_partial(&args.pool, false));
  args.pool.partial = partial.mutable_data();
  return hbert_cuda_pool_forward(&args, nullptr);
}

int pool_backward(const Array& dpooled, const py::array& x, const py::array& scorer, const Array& cu_seqlens,
                  const Array& pooled, const Array& softmax, int heads, bool full, double scale, const Array& dx,
                  const Array& dscorer) {
  PoolBackward args{pool_of(x, scorer, cu_seqlens, heads, full, scale),
                    data_of<const float>(pooled),
                    data_of<const float>(softmax),
                    data_of<const float>(dpooled),
                    data_of(dx),
                    data_of<float>(dscorer)};
  py::array_t<float> partial = work_memory(hbert_cuda_pool_partial(&args.pool, true));
  args.pool.partial = partial.mutable_data();
  return hbert_cuda_pool_backward(&args, nullptr);
}

}  // namespace

PYBIND11_MODULE(hbert_cuda_on_cpu, m) {
  m.def("seed", &hbert_shim_seed);
  m.def("row_norm_forward", &row_norm_forward);
  m.def("row_norm_backward", &row_norm_backward<const Array&, const Array&, const py::array&, const Array&,
                                                const Array&, const Array&, const Array&, const Array&, const Array&,
                                                const Array&, const Array&, const Array&, const Array&>);
  m.def("pool_forward", &pool_forward);
  m.def("pool_backward", &pool_backward);
}
