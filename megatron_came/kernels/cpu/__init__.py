"""The kernels for CPUs: plain loops over arrays, compiled by Numba, on PyTorch's threads."""
