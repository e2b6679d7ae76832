// Gives a torch that was built without CUDA a device guard that does nothing: indexing a fake CUDA tensor asks for one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
