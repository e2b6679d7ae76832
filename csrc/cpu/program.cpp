// Programs: sequences of ops that are written down once and run in one call, the driver of an optimized encoder. So no Python
// stands between two kernels, where it takes as long as a kernel on few rows.
//
// A program is a flat list of numbers. For each step: its index in kSteps; its arguments in order; a register for each output,
// or kNone where nobody reads it; the number of registers that are not read after it, and these. A tensor is a register (>= 0) or
// a constant (~index); what is optional may be kNone; a float is given by the bits of a double.
#include <limits>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops.h"

namespace hbert {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::min();

struct Program {
  std::vector<Tensor> constants;
  std::vector<int64_t> code;
  int64_t registers;
  std::vector<int64_t> outputs;
};

// One pass over the code. Registers 0 and 1 are the rows and cu_seqlens that the program is called with.
class Run {
 public:
  Run(const Program& program, const Tensor& x, const Tensor& cu_seqlens)
      : program_(program), registers_(program.registers) {
    set(0, x);
    set(1, cu_seqlens);
  }

  bool done() const { return at_ == program_.code.size(); }

  int64_t next() {
    STD_TORCH_CHECK(!done(), "run_program: the code ends within a step");
    return program_.code[at_++];
  }

  const Tensor& tensor(int64_t name) const {
    if (name < 0) {
      const uint64_t index = ~name;
      STD_TORCH_CHECK(index < program_.constants.size(), "run_program: there is no constant ", index);
      return program_.constants[index];
    }
    const std::optional<Tensor>& found = registers_[checked(name)];
    STD_TORCH_CHECK(found.has_value(), "run_program: register ", name, " is read before it is written");
    return *found;
  }

  template <class T>
  T read() {
    const int64_t value = next();
    if constexpr (std::is_same_v<T, Tensor>) {
      return tensor(value);
    } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
      return value == kNone ? T() : T(tensor(value));
    } else if constexpr (std::is_same_v<T, std::optional<int64_t>>) {
      return value == kNone ? T() : T(value);
    } else if constexpr (std::is_same_v<T, double>) {
      double number;
      std::memcpy(&number, &value, sizeof(number));
      return number;
    } else {
      return static_cast<T>(value);
    }
  }

  void write(const Tensor& output) {
    if (const int64_t name = next(); name != kNone) set(name, output);
  }

  template <class... T>
  void write(const std::tuple<T...>& outputs) {
    std::apply([this](const auto&... each) { (write(each), ...); }, outputs);
  }

  void release() {
    for (int64_t count = next(); count > 0; --count) registers_[checked(next())].reset();
  }

 private:
  size_t checked(int64_t name) const {
    STD_TORCH_CHECK(name >= 0 && static_cast<size_t>(name) < registers_.size(), "run_program: there is no register ",
                    name);
    return static_cast<size_t>(name);
  }

  void set(int64_t name, const Tensor& value) { registers_[checked(name)] = value; }

  const Program& program_;
  std::vector<std::optional<Tensor>> registers_;
  size_t at_ = 0;
};

template <class R, class... A>
void call(Run& run, R (*function)(A...)) {
  // Braces: the arguments are read in their order.
  const std::tuple<std::decay_t<A>...> arguments{run.read<std::decay_t<A>>()...};
  run.write(std::apply(function, arguments));
}

template <auto function>
void step(Run& run) {
  call(run, function);
}

// What lies between the ops: torch's where they are large, loops of our own where there is a row for each sequence and head.

Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1); }

Tensor through_dispatcher(const char* op, const char* overload, std::array<StableIValue, 2> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor multiply(const Tensor& a, const Tensor& b) {
  return through_dispatcher("aten::mul", "Tensor", {torch::stable::detail::from(a), torch::stable::detail::from(b)});
}

Tensor concatenate(const Tensor& a, const Tensor& b) {
  const int64_t last = a.dim() - 1;
  return through_dispatcher(
      "aten::cat", "", {torch::stable::detail::from(std::vector<Tensor>{a, b}), torch::stable::detail::from(last)});
}

const float* floats_of(const Tensor& t, const char* step) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), step,
                  ": tensors must be float32 and contiguous");
  return static_cast<const float*>(t.const_data_ptr());
}

// [B, H] o [h, H] -> [B, h, H], float32.
Tensor gated_scorers(const Tensor& gate, const Tensor& scorers) {
  const Rows gates = check_rows(gate, "gated_scorers");
  const int64_t heads = scorers.size(0);
  check_shape(scorers, heads, gates.width, "gated_scorers", "scorers");
  const Tensor out = allocate({gates.count, heads, gates.width}, ScalarType::Float);
  const float* g = floats_of(gate, "gated_scorers");
  const float* att = floats_of(scorers, "gated_scorers");
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t s = 0; s < gates.count; ++s, g += gates.width)
    for (int64_t j = 0; j < heads; ++j, to += gates.width)
      for (int64_t i = 0; i < gates.width; ++i) to[i] = g[i] * att[j * gates.width + i];
  return out;
}

// [B, h, H] -> [B h, H] in a dtype that a linear layer reads.
Tensor rows_of_heads(const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 3, "rows_of_heads: the input must be [sequences, heads, width]");
  return torch::stable::to(torch::stable::view(t, {t.size(0) * t.size(1), t.size(2)}), dtype);
}

// [B h, H] -> [B, h, H], float32.
Tensor heads_of_rows(const Tensor& t, int64_t heads) {
  STD_TORCH_CHECK(t.dim() == 2 && heads > 0 && t.size(0) % heads == 0,
                  "heads_of_rows: the input must be [sequences * heads, width]");
  return torch::stable::to(torch::stable::view(t, {t.size(0) / heads, heads, t.size(1)}), ScalarType::Float);
}

// [B, h, H] -> [B, H], float32: of each head its own slice.
Tensor own_slices(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) > 0 && t.size(2) % t.size(1) == 0,
                  "own_slices: the input must be [sequences, heads, width], the width a multiple of the heads");
  const int64_t sequences = t.size(0), heads = t.size(1), width = t.size(2), head_dim = width / heads;
  const Tensor out = allocate({sequences, width}, ScalarType::Float);
  const float* from = floats_of(t, "own_slices");
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t j = 0; j < heads; ++j, from += width)
      std::memcpy(to + s * width + j * head_dim, from + j * head_dim, head_dim * sizeof(float));
  return out;
}

struct Step {
  const char* name;
  void (*run)(Run&);
};

#define HBERT_STEP(function) \
  Step { #function, &step<&function> }
constexpr Step kSteps[] = {
    HBERT_STEP(layer_norm),
    HBERT_STEP(add_layer_norm),
    HBERT_STEP(conv_layer_norm),
    HBERT_STEP(activation_layer_norm),
    HBERT_STEP(layer_norm_int8),
    HBERT_STEP(add_layer_norm_int8),
    HBERT_STEP(conv_layer_norm_int8),
    HBERT_STEP(activation_layer_norm_int8),
    HBERT_STEP(quantize_rows),
    HBERT_STEP(int8_linear),
    HBERT_STEP(packed_linear),
    HBERT_STEP(attention),
    HBERT_STEP(additive_attention),
    HBERT_STEP(additive_pool),
    HBERT_STEP(gated_layer_norm),
    HBERT_STEP(gate_rows),
    HBERT_STEP(add),
    HBERT_STEP(multiply),
    HBERT_STEP(concatenate),
    HBERT_STEP(gated_scorers),
    HBERT_STEP(rows_of_heads),
    HBERT_STEP(heads_of_rows),
    HBERT_STEP(own_slices),
};
#undef HBERT_STEP
constexpr int64_t kNumSteps = std::size(kSteps);

// The programs of this process by number. It is never destroyed: at the end of a process tensors must not outlive torch.
struct Programs {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Program>> by_number;
  int64_t last = 0;

  static Programs& all() {
    static Programs& programs = *new Programs;
    return programs;
  }
};

int64_t load_program(std::vector<Tensor> constants, std::vector<int64_t> code, int64_t registers,
                     std::vector<int64_t> outputs) {
  STD_TORCH_CHECK(registers >= 2, "load_program: the inputs take two registers");
  Programs& programs = Programs::all();
  const std::lock_guard<std::mutex> lock(programs.mutex);
  programs.by_number[++programs.last] =
      std::make_shared<const Program>(Program{std::move(constants), std::move(code), registers, std::move(outputs)});
  return programs.last;
}

std::shared_ptr<const Program> program_of(int64_t number) {
  Programs& programs = Programs::all();
  const std::lock_guard<std::mutex> lock(programs.mutex);
  const auto found = programs.by_number.find(number);
  STD_TORCH_CHECK(found != programs.by_number.end(), "run_program: there is no program ", number);
  return found->second;
}

std::vector<Tensor> run_program(int64_t number, const Tensor& x, const Tensor& cu_seqlens) {
  const std::shared_ptr<const Program> program = program_of(number);
  Run run(*program, x, cu_seqlens);
  while (!run.done()) {
    const int64_t index = run.next();
    STD_TORCH_CHECK(index >= 0 && index < kNumSteps, "run_program: there is no step ", index);
    kSteps[index].run(run);
    run.release();
  }
  std::vector<Tensor> outputs;
  for (const int64_t name : program->outputs) outputs.push_back(run.tensor(name));
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hbert_kernels, CPU, m) {
  m.impl("load_program", TORCH_BOX(&load_program));
  m.impl("run_program", TORCH_BOX(&run_program));
}

}  // namespace hbert

// The index of a step, -1 for none of that name.
extern "C" __attribute__((visibility("default"))) int64_t hbert_program_step(const char* name) {
  for (int64_t i = 0; i < hbert::kNumSteps; ++i)
    if (std::strcmp(hbert::kSteps[i].name, name) == 0) return i;
  return -1;
}

extern "C" __attribute__((visibility("default"))) void hbert_free_program(int64_t number) {
  hbert::Programs& programs = hbert::Programs::all();
  // Destroyed behind the lock: the end of a tensor may run Python, which may free another program.
  std::shared_ptr<const hbert::Program> freed;
  const std::lock_guard<std::mutex> lock(programs.mutex);
  const auto found = programs.by_number.find(number);
  if (found == programs.by_number.end()) return;
  freed = std::move(found->second);
  programs.by_number.erase(found);
}
