#include "level.h"

#include <cstdlib>
#include <cstring>

#if defined(HBERT_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hbert {
namespace {

#define HBERT_NAME(level) #level,
constexpr const char* kNames[] = {HBERT_FOR_LEVELS(HBERT_NAME)};
#undef HBERT_NAME

#if defined(HBERT_X86)

// Whether the processor has AMX with bfloat16 and int8, and this process may use it, which Linux has to be asked for.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat16 | kTile | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

int best_level() {
#if defined(HBERT_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return avx2 + avx512 + bf16 + (bf16 && has_amx());
#else
  return 0;
#endif
}

int capped_level() {
  const int best = best_level();
  const char* cap = std::getenv("HBERT_CPU_CAPABILITY");
  for (int i = 0; cap != nullptr && i < best; ++i)
    if (std::strcmp(cap, kNames[i]) == 0) return i;
  return best;
}

}  // namespace

int level_index() {
  static const int chosen = capped_level();
  return chosen;
}

bool has_fast_bfloat16_products() { return std::strncmp(kNames[level_index()], "avx512", 6) == 0; }

}  // namespace hbert

extern "C" __attribute__((visibility("default"))) const char* hbert_cpu_capability() {
  return hbert::kNames[hbert::level_index()];
}
