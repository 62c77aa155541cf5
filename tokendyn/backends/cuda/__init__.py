"""CUDA kernels that several backends launch: how they divide a call, and their compilation at run time."""
