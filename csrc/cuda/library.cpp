// What dispatch asks of the library itself.
#include "../abi.h"
#include "kernels.h"

// The architectures with machine code inside, such as "80,90,100"; the newest is there as PTX too.
HBERT_EXPORT const char* hbert_cuda_architectures() { return HBERT_CUDA_ARCHITECTURES; }

HBERT_EXPORT int64_t hbert_cuda_max_row_width() { return hbert::cuda::kMaxRowWidth; }
