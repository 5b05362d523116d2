"""The kernels for CPUs, compiled by Numba; see ``program`` for how threads share them."""
