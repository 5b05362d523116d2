"""The kernels for CPUs, compiled by Numba; see ``task`` for how threads share them."""
