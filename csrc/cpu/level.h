// The instruction set levels, and the choice among them, made once when the library is loaded.
#pragma once
#include <stdint.h>

// X(level) for every level that is compiled for this architecture, narrowest first. Those that add nothing but dot products of
// int8 numbers are compiled for these alone: HBERT_FOR_CODE_LEVELS has the level below instead.
#if defined(HBERT_X86)
#define HBERT_FOR_LEVELS(X) X(scalar) X(avx2) X(avx2_vnni) X(avx512) X(avx512_vnni) X(avx512_bf16) X(avx512_amx)
#define HBERT_FOR_CODE_LEVELS(X) X(scalar) X(avx2) X(avx2) X(avx512) X(avx512) X(avx512_bf16) X(avx512_amx)
#elif defined(HBERT_ARM)
#define HBERT_FOR_LEVELS(X) X(scalar) X(neon_dot)
#define HBERT_FOR_CODE_LEVELS(X) X(scalar) X(scalar)
#else
#define HBERT_FOR_LEVELS(X) X(scalar)
#define HBERT_FOR_CODE_LEVELS(X) X(scalar)
#endif

namespace hbert {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat64 };

// Index among HBERT_FOR_LEVELS of the best level that this CPU has, capped by HBERT_CPU_CAPABILITY.
int level_index();

// Whether torch's library has fast bfloat16 matrix products here. Without AVX-512 they take a hundred times as long as
// float32 ones.
bool has_fast_bfloat16_products();

}  // namespace hbert
