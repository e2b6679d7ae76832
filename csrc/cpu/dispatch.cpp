#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace hbert {
namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

const Kernels* choose() {
  const Level levels[] = {
      {&scalar::kKernels, true},
#if defined(HBERT_X86)
      {&avx2::kKernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {&avx512::kKernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&avx512_bf16::kKernels, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
#endif
  };
  const char* cap = std::getenv("HBERT_CPU_CAPABILITY");
  const Kernels* best = &scalar::kKernels;
  for (const Level& level : levels) {
    if (!level.supported) break;
    best = level.kernels;
    if (cap != nullptr && std::strcmp(cap, best->level) == 0) break;
  }
  return best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace hbert

extern "C" __attribute__((visibility("default"))) const char* hbert_cpu_capability() {
  return hbert::kernels().level;
}
