// Ops attention and attention_backward on the CPU: checks, allocation, division of the work among threads.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "denormals.h"
#include "sequences.h"

namespace hbert {
namespace {

// Queries per task of the forward pass: few enough that one long sequence feeds many threads, enough to outweigh that
// each thread repacks the keys and values that it meets.
constexpr int64_t kTaskQueries = 192;

#define HBERT_TABLE(level) &level::kAttention,
constexpr const AttentionKernels* kTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE
#define HBERT_TABLE(level) &level::kAttentionBackward,
constexpr const AttentionBackwardKernels* kBackwardTables[] = {HBERT_FOR_CODE_LEVELS(HBERT_TABLE)};
#undef HBERT_TABLE

struct Problem {
  int64_t num_tokens, num_heads, head_size;
  DType dtype;
  Sequences sequences;

  int64_t width() const { return num_heads * head_size; }
};

Problem check(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads, const char* op) {
  STD_TORCH_CHECK(qkv.dim() == 2 && num_heads > 0 && qkv.size(1) > 0 && qkv.size(1) % (3 * num_heads) == 0, op,
                  ": qkv must be [T, 3H] with H divisible by num_heads");
  return {qkv.size(0), num_heads, qkv.size(1) / (3 * num_heads), dtype_of(qkv, op, "qkv"),
          split_sequences(cu_seqlens, qkv.size(0), op)};
}

// What the arguments of forward and backward have in common.
template <class Arguments>
Arguments arguments_of(const Problem& problem) {
  Arguments args{};
  args.num_tokens = problem.num_tokens;
  args.num_heads = problem.num_heads;
  args.head_size = problem.head_size;
  args.scale = 1 / std::sqrt(static_cast<double>(problem.head_size));
  args.dtype = problem.dtype;
  return args;
}

// The tasks of a problem and where each begins on an axis of cost, so that equal pieces of the axis are equal work.
struct Plan {
  std::vector<AttentionTask> tasks;
  std::vector<int64_t> starts;
  int64_t cost = 0, max_length = 0;

  Plan(const Problem& problem, int64_t task_queries) {
    for (const Chunk& chunk : problem.sequences.chunks)
      for (int64_t head = 0; head < problem.num_heads && chunk.rows.begin == chunk.rows.first_row; ++head)
        add(head, chunk.rows.first_row, chunk.rows.end_row, task_queries);
  }

  void add(int64_t head, int64_t begin, int64_t end, int64_t task_queries) {
    const int64_t length = end - begin;
    max_length = std::max(max_length, length);
    for (int64_t query = 0; query < length; query += task_queries) {
      const int64_t query_end = std::min(query + task_queries, length);
      tasks.push_back({head, begin, length, query, query_end});
      starts.push_back(cost);
      cost += (query_end - query + 8) * (length + 8);
    }
  }

  // run(tasks, count) for runs of neighbouring tasks, in parallel.
  template <class F>
  void for_each_run(const F& run) const {
    constexpr int64_t kMinCost = 4096;
    torch::stable::parallel_for(0, cost, kMinCost, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      const auto first = std::lower_bound(starts.begin(), starts.end(), begin) - starts.begin();
      const auto last = std::lower_bound(starts.begin(), starts.end(), end) - starts.begin();
      if (first < last) run(tasks.data() + first, last - first);
    });
  }
};

}  // namespace

// max_seqlen is what GPUs size their grids by; here the sequences themselves are at hand.
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t /*max_seqlen*/,
                                     int64_t num_heads) {
  const Problem problem = check(qkv, cu_seqlens, num_heads, "attention");
  const Tensor dense = as_dense(qkv);
  Tensor out = allocate({problem.num_tokens, problem.width()}, qkv.scalar_type());
  Tensor log_sum_exp = allocate_zeros({num_heads, problem.num_tokens}, compute_type(problem.dtype));
  AttentionForward args = arguments_of<AttentionForward>(problem);
  args.qkv = dense.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.log_sum_exp = log_sum_exp.mutable_data_ptr();
  const Plan plan(problem, kTaskQueries);
  const AttentionKernels& kernels = table_for(problem.dtype, kTables);
  const size_t scratch = kernels.forward_scratch(args, plan.max_length);
  plan.for_each_run([&](const AttentionTask* tasks, int64_t count) {
    kernels.forward(args, tasks, count, workspace<Slot::kTask>(scratch));
  });
  zero_dead_rows(out, problem.sequences.num_rows);
  return {out, log_sum_exp};
}

namespace {

void check_like_out(const Tensor& t, const Tensor& qkv, const Problem& problem, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == problem.num_tokens && t.size(1) == problem.width() &&
                      t.scalar_type() == qkv.scalar_type(),
                  "attention_backward: ", name, " must be [T, H] in the dtype of qkv");
}

Tensor attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& log_sum_exp,
                          const Tensor& cu_seqlens, int64_t /*max_seqlen*/, int64_t num_heads) {
  const char* op = "attention_backward";
  const Problem problem = check(qkv, cu_seqlens, num_heads, op);
  check_like_out(dout, qkv, problem, "dout");
  check_like_out(out, qkv, problem, "out");
  STD_TORCH_CHECK(log_sum_exp.dim() == 2 && log_sum_exp.size(0) == num_heads &&
                      log_sum_exp.size(1) == problem.num_tokens && log_sum_exp.is_contiguous() &&
                      log_sum_exp.scalar_type() == compute_type(problem.dtype),
                  op, ": log_sum_exp must be contiguous [num_heads, T] in the compute dtype");
  const Tensor dense_dout = as_dense(dout), dense_qkv = as_dense(qkv);
  const Tensor dense_out = as_dense(out);
  Tensor dqkv = allocate({problem.num_tokens, 3 * problem.width()}, qkv.scalar_type());
  AttentionBackward args = arguments_of<AttentionBackward>(problem);
  args.dout = dense_dout.const_data_ptr();
  args.qkv = dense_qkv.const_data_ptr();
  args.out = dense_out.const_data_ptr();
  args.log_sum_exp = log_sum_exp.const_data_ptr();
  args.dqkv = dqkv.mutable_data_ptr();
  const Plan plan(problem, std::max<int64_t>(problem.num_tokens, 1));
  const AttentionBackwardKernels& kernels = table_for(problem.dtype, kBackwardTables);
  const size_t scratch = kernels.backward_scratch(args, plan.max_length);
  plan.for_each_run([&](const AttentionTask* tasks, int64_t count) {
    kernels.backward(args, tasks, count, workspace<Slot::kTask>(scratch));
  });
  zero_dead_rows(dqkv, problem.sequences.num_rows);
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace hbert
