// The scheduler of the CUDA-on-CPU shim. Compile it without sanitizers, but with HBERT_SHIM_ADDRESS or
// HBERT_SHIM_THREAD where the kernels have the address or the thread sanitizer.
//
// Under the thread sanitizer each CUDA thread is a fiber of the sanitizer, switched to without an order: only
// barriers, warp barriers and fence + atomic pairs order memory accesses, so a race is found even where the
// schedule hides it.
#include "cuda_shim.h"
#include "sanitizers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#error "the shim switches stacks in x86-64 assembly"
#endif
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

// Saves the callee-saved registers and swaps stacks. swapcontext makes a system call, which costs 40 times as much.
asm(R"(
.text
.globl hbert_shim_switch
.type hbert_shim_switch,@function
hbert_shim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size hbert_shim_switch,.-hbert_shim_switch
)");
extern "C" void hbert_shim_switch(void** save_stack, void* to_stack);

namespace hbert_shim {

Thread current;
cudaError_t last_error = cudaSuccess;

namespace {

#if defined(HBERT_SHIM_THREAD)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
constexpr unsigned kNoOrder = 1;  // a flag of __tsan_switch_to_fiber
constexpr size_t kStack = 128 * 1024, kArena = size_t(1) << 31, kMaxSharedBytes = 48 * 1024;

enum class State { kReady, kBarrier, kWarp, kDone };

struct Fiber {
  void *stack_pointer = nullptr, *stack = nullptr, *sanitizer = nullptr, *fake_stack = nullptr;
  uint3 index;
  int linear;
  State state = State::kDone;
  const char* file;
  int line;
  unsigned mask, barriers, warp_barriers;
  uint64_t value, received[32];
  bool fenced;
  void* atomics[4];  // the latest ones since a fence
  unsigned num_atomics;
};

struct {
  void *stack_pointer, *sanitizer, *fake_stack;
  const void* stack;
  size_t stack_size;
} scheduler;

std::vector<Fiber*> all_fibers, fibers;  // fibers: of the block that runs
Fiber* running;
const std::function<void()>* kernel;
std::mt19937_64 random_bits;
uint64_t seed = 1, launches = 0;

std::vector<std::pair<const void*, void*>> static_arrays;
void* dynamic_array;
size_t dynamic_bytes;
char kernel_started, kernel_ended, *barrier_objects, *arena;
size_t arena_used;

std::string where(const Fiber* f) {
  return "block (" + std::to_string(current.block_index.x) + "," + std::to_string(current.block_index.y) + ") thread " +
         std::to_string(f->linear) + " at " + f->file + ":" + std::to_string(f->line);
}

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "CUDA shim: %s\n", message.c_str());
  std::abort();
}

void to_scheduler() {
  Fiber* f = running;
  __sanitizer_start_switch_fiber(&f->fake_stack, scheduler.stack, scheduler.stack_size);
  __tsan_switch_to_fiber(scheduler.sanitizer, kNoOrder);
  hbert_shim_switch(&f->stack_pointer, scheduler.stack_pointer);
  __sanitizer_finish_switch_fiber(f->fake_stack, &scheduler.stack, &scheduler.stack_size);
}

void to_fiber(Fiber* f) {
  running = f;
  current.index = f->index;
  current.linear = f->linear;
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, f->stack, kStack);
  __tsan_switch_to_fiber(f->sanitizer, kNoOrder);
  hbert_shim_switch(&scheduler.stack_pointer, f->stack_pointer);
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
  for (;;) {
    __tsan_acquire(&kernel_started);
    (*kernel)();
    __tsan_release(&kernel_ended);
    running->state = State::kDone;
    to_scheduler();
  }
}

void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("out of memory");
  return memory;
}

void create_fibers(size_t count) {
  while (all_fibers.size() < count) {
    Fiber* f = new Fiber();
    f->stack = map_memory(kStack);
    // What hbert_shim_switch pops: six registers and the entry; above it a null return address, so that the stack
    // is aligned as it is after a call.
    void** top = reinterpret_cast<void**>(static_cast<char*>(f->stack) + kStack) - 3;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    f->stack_pointer = top - 6;
    f->sanitizer = __tsan_create_fiber(0);
    all_fibers.push_back(f);
  }
}

// NaN in float, half and bfloat16. The thread sanitizer must not take memory for reused: never the same address
// twice in a launch. The address sanitizer sees its ends: a malloc of exact size.
void* allocate_shared(size_t bytes) {
  char* memory;
  if (kThreadSanitizer) {
    memory = arena + arena_used;
    arena_used += (bytes + 127) / 64 * 64;
    if (arena_used > kArena) fail("no shared memory left: use a smaller grid under the thread sanitizer");
  } else {
    memory = static_cast<char*>(std::malloc(bytes ? bytes : 1));
  }
  for (size_t i = 0; i < bytes; ++i) const_cast<volatile char*>(memory)[i] = static_cast<char>(0xff);
  return memory;
}

void free_shared() {
  if (!kThreadSanitizer) {
    for (const auto& [key, memory] : static_arrays) std::free(memory);
    std::free(dynamic_array);
  }
  static_arrays.clear();
  dynamic_array = nullptr;
}

void wait(State state, const char* file, int line) {
  running->state = state;
  running->file = file;
  running->line = line;
  to_scheduler();
}

// The threads that can run. Between two barriers either any of them goes on, or warps have strict random
// priorities, so that one runs far ahead of the others.
class Ready {
 public:
  bool empty() const { return count_ == 0; }

  void begin(int threads) {
    warps_ = (threads + 31) / 32;
    strict_ = random_bits() & 1;
    for (int i = 0; i < warps_; ++i) order_[i] = i;
    std::shuffle(order_, order_ + warps_, random_bits);
    for (int i = 0; i < threads; ++i) push(i);
  }

  void push(int thread) {
    of_warp_[thread / 32].push_back(thread);
    ++count_;
  }

  int pop() {
    int warp = 0;
    if (strict_) {
      while (of_warp_[order_[warp]].empty()) ++warp;
      warp = order_[warp];
    } else {
      do warp = static_cast<int>(random_bits() % warps_);
      while (of_warp_[warp].empty());
    }
    std::vector<int>& threads = of_warp_[warp];
    std::swap(threads[random_bits() % threads.size()], threads.back());
    const int thread = threads.back();
    threads.pop_back();
    --count_;
    return thread;
  }

 private:
  std::vector<int> of_warp_[32];
  int order_[32], warps_ = 0, count_ = 0;
  bool strict_ = false;
} ready;

// f(lane, fiber) for the lanes that a waiting thread's mask names.
template <class F>
void for_mask(const Fiber* f, F visit) {
  const size_t first = f->linear & ~31;
  for (size_t lane = 0; lane < 32; ++lane) {
    if (!(f->mask >> lane & 1)) continue;
    if (first + lane >= fibers.size())
      fail(where(f) + ": the mask names lane " + std::to_string(lane) + ", beyond the block");
    visit(lane, fibers[first + lane]);
  }
}

// Lets the lanes of a warp go on once all that the mask of one of them names have come.
void complete_warp(const Fiber* f) {
  bool all = true;
  for_mask(f, [&](size_t lane, const Fiber* other) {
    if (other->state == State::kDone)
      fail(where(f) + ": waits for lane " + std::to_string(lane) + ", which has exited");
    if (other->state != State::kWarp) all = false;
    else if (other->line != f->line || other->file != f->file || other->mask != f->mask)
      fail(where(f) + " and " + where(other) + ": different warp operations or masks");
  });
  if (!all) return;
  uint64_t values[32];
  for (uint64_t& value : values) value = ~uint64_t(0);
  for_mask(f, [&](size_t lane, const Fiber* other) { values[lane] = other->value; });
  for_mask(f, [&](size_t, Fiber* other) {
    std::memcpy(other->received, values, sizeof(values));
    other->state = State::kReady;
    ready.push(other->linear);
  });
}

// True once all threads of the block have ended; otherwise all are at one barrier.
bool check_barrier() {
  size_t done = 0;
  for (const Fiber* f : fibers) {
    if (f->state == State::kWarp) fail("deadlock: " + where(f) + ": lanes of its mask never come");
    done += f->state == State::kDone;
  }
  if (done == fibers.size()) return true;
  for (const Fiber* f : fibers) {
    if (done && f->state == State::kBarrier)
      fail("barrier divergence: " + where(f) + " waits, " + std::to_string(done) + " threads have exited");
    if (f->line != fibers[0]->line || f->file != fibers[0]->file)
      fail("barrier divergence: " + where(fibers[0]) + " and " + where(f));
  }
  return false;
}

void run_block() {
  do {
    ready.begin(static_cast<int>(fibers.size()));
    while (!ready.empty()) {
      Fiber* f = fibers[ready.pop()];
      f->state = State::kReady;
      to_fiber(f);
      if (f->state == State::kReady) ready.push(f->linear);  // interrupted at an atomic
      if (f->state == State::kWarp) complete_warp(f);
    }
  } while (!check_barrier());
}

void begin_block(size_t index, size_t first_fiber, dim3 grid, dim3 block) {
  current.block_index =
      make_uint3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                 static_cast<unsigned>(index / grid.x / grid.y));
  free_shared();
  if (kThreadSanitizer) barrier_objects = static_cast<char*>(allocate_shared(2 + 2 * 32));
  if (dynamic_bytes) dynamic_array = allocate_shared(dynamic_bytes);
  fibers.clear();
  const unsigned threads = block.x * block.y * block.z;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* f = all_fibers[first_fiber + i];
    f->index = make_uint3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    f->linear = static_cast<int>(i);
    f->state = State::kReady;
    f->file = "start";
    f->line = 0;
    f->barriers = f->warp_barriers = f->num_atomics = 0;
    f->fenced = false;
    fibers.push_back(f);
  }
}

}  // namespace

void barrier(const char* file, int line) {
  char* object = barrier_objects + (running->barriers++ & 1);
  __tsan_release(object);
  wait(State::kBarrier, file, line);
  __tsan_acquire(object);
}

const uint64_t* exchange(unsigned mask, uint64_t value, const char* file, int line) {
  running->mask = mask;
  running->value = value;
  running->file = file;
  running->line = line;
  if (!(mask >> (running->linear & 31) & 1)) fail(where(running) + ": a lane that is not in its own mask");
  wait(State::kWarp, file, line);
  return running->received;
}

void warp_barrier(unsigned mask, const char* file, int line) {
  char* object = barrier_objects + 2 + 2 * (running->linear / 32) + (running->warp_barriers++ & 1);
  __tsan_release(object);
  exchange(mask, 0, file, line);
  __tsan_acquire(object);
}

void check_source_lane(int lane) {
  if (!(running->mask >> lane & 1)) fail(where(running) + ": reads lane " + std::to_string(lane) + ", not in the mask");
}

void* static_shared(const void* key, size_t bytes) {
  for (const auto& [known, memory] : static_arrays)
    if (known == key) return memory;
  return static_arrays.emplace_back(key, allocate_shared(bytes)).second;
}

void* dynamic_shared() { return dynamic_array; }

void before_atomic(void* address) {
  if ((random_bits() & 3) == 0) to_scheduler();
  if (running->fenced) __tsan_release(address);
}

void after_atomic(void* address) { running->atomics[running->num_atomics++ & 3] = address; }

void fence() {
  running->fenced = true;
  for (unsigned i = 0; i < std::min(running->num_atomics, 4u); ++i) __tsan_acquire(running->atomics[i]);
  running->num_atomics = 0;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  const bool too_large = threads > 1024 || block.z > 64 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535;
  if (threads == 0 || blocks == 0 || too_large) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  ++launches;
  random_bits.seed(seed);
  current.grid_size = grid;
  current.block_size = block;
  dynamic_bytes = shared_bytes;
  kernel = &body;
  // Successive blocks run on disjoint sets of fibers: one that had passed a barrier of block A would order A before
  // B.
  const size_t sets =
      kThreadSanitizer ? std::min(blocks, std::max<size_t>(2, std::min<size_t>(16, 1024 / threads))) : 1;
  create_fibers(threads * sets);
  scheduler.sanitizer = __tsan_get_current_fiber();
  arena_used = 0;
  if (kThreadSanitizer && !arena) arena = static_cast<char*>(map_memory(kArena));
  __tsan_release(&kernel_started);
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  for (size_t i = 0; i < blocks; ++i) {
    begin_block(order[i], (i % sets) * threads, grid, block);
    run_block();
  }
  __tsan_acquire(&kernel_ended);
  free_shared();
  return cudaSuccess;
}

}  // namespace hbert_shim

#define HBERT_SHIM_EXPORT extern "C" __attribute__((visibility("default")))
// The schedule of the launches that follow, and how many there were.
HBERT_SHIM_EXPORT void hbert_shim_seed(uint64_t value) { hbert_shim::seed = value; }
HBERT_SHIM_EXPORT uint64_t hbert_shim_launches() { return hbert_shim::launches; }
