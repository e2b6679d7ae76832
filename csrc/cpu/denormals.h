// Denormal numbers as zeros, for as long as a task runs.
#pragma once
#if defined(HBERT_X86)
#include <immintrin.h>
#endif

namespace hbert {

// Softmax weights of a trained model underflow into denormals, on which Intel's multipliers take some hundred cycles: attention
// took 20 to 45 times as long. In results they are far below the rounding of a weight near 1. Arm's cores have no such penalty.
class FlushDenormals {
 public:
#if defined(HBERT_X86)
  FlushDenormals() { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
  const unsigned before_ = _mm_getcsr();
#else
  FlushDenormals() {}
#endif
};

}  // namespace hbert
