"""Triton kernels of the ops, one file per stem: functions with the arguments and results of the op's schema.

They are imported where they are used, since triton may be missing. Kernels convert to float32 after each load, use
no floating-point atomics, no autotuning, no device library and no assumption on the warp size; what a kernel is
compiled for is a pure function of shapes and dtypes.
"""
