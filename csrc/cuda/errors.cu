#include "kernels.h"
#include "platform.h"

HBERT_EXPORT const char* hbert_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
