// The choice of the instruction set level, made once when the library is loaded.
#pragma once
#include "kernels.h"

namespace hbert {

// The best level that this CPU has, capped by HBERT_CPU_CAPABILITY (scalar | avx2 | avx512 | avx512_bf16).
const Kernels& kernels();

// The kernels for a dtype: float64 has scalar code only.
inline const Kernels& kernels_for(DType dtype) { return dtype == DType::kFloat64 ? scalar::kKernels : kernels(); }

}  // namespace hbert
