// What the sanitizers must be told of fibers, and of what orders their memory accesses; nothing without them.
#pragma once
#include <stddef.h>

#if defined(HBERT_SHIM_ADDRESS)
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif
#if defined(HBERT_SHIM_THREAD)
extern "C" void* __tsan_create_fiber(unsigned);
extern "C" void* __tsan_get_current_fiber();
extern "C" void __tsan_switch_to_fiber(void*, unsigned);
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void* __tsan_get_current_fiber() { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
