// The CUDA kernels as their callers see them: plain structs, raw device pointers, one C function per launch or pair
// of launches, which returns a cudaError_t. Included by both sides, so it holds neither CUDA nor torch.
#pragma once
#include <stdint.h>

#define HBERT_EXPORT extern "C" __attribute__((visibility("default")))

namespace hbert {
namespace cuda {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// What is normalized in row t of sequence s.
enum class RowSource : int32_t {
  kPlain,       // x_t
  kResidual,    // x_t + residual_t, stored as total_t and normalized as stored
  kActivation,  // act(x_t + input_bias)
  kGated,       // x_t o gate_s
};

enum class Activation : int32_t { kGelu, kGeluTanh, kRelu };

// Arrays whose dtype is known when a kernel runs; null: not given.
struct Values {
  const void* data;
  DType dtype;
};
struct MutableValues {
  void* data;
  DType dtype;
};

// Packed tokens: sequence s has the rows cu_seqlens[s] to cu_seqlens[s + 1]; rows behind the last sequence are
// dead.
struct Packing {
  const int32_t* cu_seqlens;  // [sequences + 1]; null: rows without sequences
  int64_t sequences, rows;
};

constexpr int64_t kMaxRowWidth = 4096;  // of the row norms

struct RowNormForward {
  RowSource source;
  Activation activation;
  Packing packing;
  int32_t width;
  float eps;
  DType dtype;          // of x and y
  const void* x;        // [rows, width]
  Values residual;      // [rows, width]
  MutableValues total;  // [rows, width]
  Values input_bias;    // [width]
  const float* gate;    // [sequences, width]
  Values weight, bias;  // [width]
  void* y;              // [rows, width]
  float* mean;          // [rows]
  float* rstd;          // [rows]
  bool aligned;         // the launcher's
};

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + dtotal with g = dy weight, carried through the source to x.
struct RowNormBackward {
  RowSource source;  // kPlain also for a residual: x is then the total
  Activation activation;
  Packing packing;
  int32_t width;
  DType dtype;            // of x, dtotal and dx
  Values dy;              // [rows, width]
  const void* dtotal;     // [rows, width], or null
  const void* x;          // [rows, width]
  Values input_bias;      // [width]
  const float* gate;      // [sequences, width]
  const float* mean;      // [rows]
  const float* rstd;      // [rows]
  Values weight;          // [width]
  void* dx;               // [rows, width]
  MutableValues dweight;  // [width], or null
  MutableValues dbias;    // [width], or null
  MutableValues dsource;  // of input_bias [width], or of gate [sequences, width], or null
  float* partial;         // hbert_cuda_row_norm_partial(...) values
  bool aligned;           // the launcher's
};

constexpr int64_t kMaxPoolHeads = 64;

// score[t, j] = scale x_t . scorer_j; alpha = softmax over the rows of a sequence; pooled_j = sum_t alpha[t, j]
// x_t. Tables of vectors, one per head, have rows of the whole width or of the head's own slice of x.
struct Pool {
  Packing packing;
  int32_t width, heads;
  bool dense_scorer;  // scorer rows: width, otherwise width / heads
  bool full_output;   // pooled rows: width, otherwise width / heads
  float scale;
  DType dtype;            // of x
  const void* x;          // [rows, width]
  const float* scorer;    // [(sequences,) heads, row]
  int64_t scorer_stride;  // values between the scorers of two sequences; 0: one for all
  float* partial;         // hbert_cuda_pool_partial(...) values
};

struct PoolForward {
  Pool pool;
  float* pooled;   // [sequences, heads, row]
  float* softmax;  // [sequences, 2, heads]: the largest score, and the sum of exp(score - largest)
};

struct PoolBackward {
  Pool pool;
  const float* pooled;
  const float* softmax;
  const float* dpooled;  // [sequences, heads, row]
  void* dx;              // [rows, width], the dtype of x
  float* dscorer;        // the shape of scorer
};

// out = the sum of a part of every slot's partial result, in a fixed order. A slot is a block of rows, or a chunk
// of a sequence.
struct SlotSum {
  int64_t offset, width;  // the part of a slot
  MutableValues out;      // [width], or with `per_sequence` [sequences, width]; null: nobody asked for it
  bool per_sequence;
};

struct SlotSums {
  const float* partial;  // [slots, stride]
  int64_t stride, slots;
  Packing packing;
  int32_t chunk;  // rows
  SlotSum sums[3];
};

}  // namespace cuda
}  // namespace hbert

HBERT_EXPORT const char* hbert_cuda_error(int code);  // the text of a cudaError_t
// Values of the work memory `partial` of the backward pass of a row norm.
HBERT_EXPORT int64_t hbert_cuda_row_norm_partial(const hbert::cuda::RowNormBackward* args);
HBERT_EXPORT int hbert_cuda_row_norm_forward(const hbert::cuda::RowNormForward* args, void* stream);
HBERT_EXPORT int hbert_cuda_row_norm_backward(const hbert::cuda::RowNormBackward* args, void* stream);
// Values of the work memory `partial` of additive pooling.
HBERT_EXPORT int64_t hbert_cuda_pool_partial(const hbert::cuda::Pool* pool, bool backward);
HBERT_EXPORT int hbert_cuda_pool_forward(const hbert::cuda::PoolForward* args, void* stream);
HBERT_EXPORT int hbert_cuda_pool_backward(const hbert::cuda::PoolBackward* args, void* stream);
// Used by the backward passes above.
HBERT_EXPORT int hbert_cuda_slot_sums(const hbert::cuda::SlotSums* args, void* stream);
