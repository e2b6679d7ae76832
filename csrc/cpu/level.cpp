#include "level.h"

#include "../abi.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>

#if defined(HBERT_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(HBERT_ARM)
#include <sys/auxv.h>
#endif

namespace hbert {
namespace {

#define HBERT_NAME(level) #level,
constexpr const char* kNames[] = {HBERT_FOR_LEVELS(HBERT_NAME)};
#undef HBERT_NAME

#if defined(HBERT_X86)

// Instructions that not every compiler has a name for: leaf 7 of cpuid.
struct Features {
  unsigned eax1 = 0, edx = 0;

  Features() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) edx = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) eax1 = a;
  }
  bool avx_vnni() const { return (eax1 & (1u << 4)) != 0; }
  bool avx512_fp16() const { return (edx & (1u << 23)) != 0; }
  // AMX with bfloat16 and int8, which a process may use if Linux, when asked, lets it.
  bool amx() const {
#if defined(__linux__)
    constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat16 | kTile | kInt8;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (edx & kAll) == kAll && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
};

#endif

// Which of the levels this processor has.
std::array<bool, std::size(kNames)> levels_here() {
#if defined(HBERT_X86)
  const Features more;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16"), amx = bf16 && more.amx();
  // Intel's processors since AMX have vdpbf16ps at half of the rate of float32's products: where a virtual machine hides
  // AMX, it is of no use.
  const bool slow_bf16 = __builtin_cpu_is("intel") && more.avx512_fp16() && !amx;
  return {true, avx2, avx2 && more.avx_vnni(), avx512, vnni, bf16 && !slow_bf16, amx};
#elif defined(HBERT_ARM)
  return {true, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0};
#else
  return {true};
#endif
}

int capped_level() {
  const char* cap = std::getenv("HBERT_CPU_CAPABILITY");
  const auto here = levels_here();
  int level = static_cast<int>(here.size()) - 1;
  for (int i = 0; cap != nullptr && i < level; ++i)
    if (std::strcmp(cap, kNames[i]) == 0) level = i;
  while (!here[level]) --level;
  return level;
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
