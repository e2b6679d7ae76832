// What both libraries show, unrun, to hbert_kernels/_library.py: the number there, and schemas that they implement. Any other
// is not loaded, since torch would call functions with the arguments of other ones.
#pragma once

extern "C" {
__attribute__((visibility("default"))) extern const char hbert_abi[] = "hbert_abi 1";
}
