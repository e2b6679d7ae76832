// Ops softmax_cross_entropy_ and accumulate_ on the CPU: what masked_lm_loss runs between its matrix products.
#include <tuple>

#include "masked_lm_loss.h"
#include "denormals.h"
#include "tensors.h"

namespace hbert {
namespace {

#define HBERT_TABLE(level) &level::kMaskedLmLoss,
constexpr const MaskedLmLossKernels* kTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

constexpr int64_t kAddGrain = 65536;  // elements per task

const int64_t* check_labels(const Tensor& labels, int64_t rows, int64_t vocab, const char* op) {
  STD_TORCH_CHECK(
      labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == rows && labels.is_contiguous(),
      op, ": labels must be contiguous int64 [rows]");
  const int64_t* values = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < vocab, op, ": label ", values[i], " is not in [0, ", vocab, ")");
  return values;
}

const void* check_bias(const std::optional<Tensor>& bias, int64_t vocab, DType dtype, const char* op) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == vocab && bias->is_contiguous() && bias->scalar_type() == compute_type(dtype),
      op, ": bias must be contiguous [vocab] in the compute dtype");
  return bias->const_data_ptr();
}

std::tuple<Tensor, Tensor> softmax_cross_entropy(const Tensor& logits, const std::optional<Tensor>& bias,
                                                 const Tensor& labels, double label_smoothing, double scale,
                                                 bool gradient) {
  const char* op = "softmax_cross_entropy_";
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1, op,
                  ": logits must be [rows, vocab] with dense rows");
  const int64_t rows = logits.size(0);
  SoftmaxCrossEntropy args{};
  args.vocab = logits.size(1);
  args.stride = logits.stride(0);
  args.dtype = dtype_of(logits, op, "logits");
  args.label_smoothing = label_smoothing;
  args.scale = scale;
  args.gradient = gradient;
  args.labels = check_labels(labels, rows, args.vocab, op);
  args.bias = check_bias(bias, args.vocab, args.dtype, op);
  Tensor loss = allocate({rows}, compute_type(args.dtype));
  Tensor correct = allocate({rows}, labels.scalar_type());
  args.logits = logits.mutable_data_ptr();
  args.loss = loss.mutable_data_ptr();
  args.correct = static_cast<int64_t*>(correct.mutable_data_ptr());
  const MaskedLmLossKernels& k = table_for(args.dtype, kTables);
  torch::stable::parallel_for(0, rows, row_grain(args.vocab), [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    k.softmax_cross_entropy(args, begin, end, workspace<Slot::kTask>(args.vocab * compute_size(args.dtype)));
  });
  return {loss, correct};
}

void accumulate(const Tensor& sum, const std::optional<Tensor>& remainder, const Tensor& term) {
  const char* op = "accumulate_";
  Accumulate args{};
  args.sum_dtype = dtype_of(sum, op, "sum");
  args.term_dtype = dtype_of(term, op, "term");
  STD_TORCH_CHECK(args.sum_dtype != DType::kFloat64 && args.term_dtype != DType::kFloat64, op,
                  ": sum and term must be float32 or bfloat16");
  STD_TORCH_CHECK(sum.is_contiguous() && term.is_contiguous() && term.numel() == sum.numel(), op,
                  ": sum and term must be contiguous, of one size");
  STD_TORCH_CHECK((args.sum_dtype == DType::kBFloat16) == remainder.has_value(), op,
                  ": a remainder belongs to a bfloat16 sum and to no other");
  if (remainder.has_value()) {
    STD_TORCH_CHECK(remainder->is_contiguous() && remainder->numel() == sum.numel() &&
                        remainder->scalar_type() == ScalarType::BFloat16,
                    op, ": remainder must be contiguous bfloat16, of the size of sum");
    args.remainder = remainder->mutable_data_ptr();
  }
  args.sum = sum.mutable_data_ptr();
  args.term = term.const_data_ptr();
  const MaskedLmLossKernels& k = table_for(args.sum_dtype, kTables);
  torch::stable::parallel_for(0, sum.numel(), kAddGrain,
                              [&](int64_t begin, int64_t end) { k.accumulate(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("softmax_cross_entropy_", TORCH_BOX(&softmax_cross_entropy));
  m.impl("accumulate_", TORCH_BOX(&accumulate));
}

}  // namespace hbert
