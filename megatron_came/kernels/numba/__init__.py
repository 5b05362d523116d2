"""The kernels for CPUs, compiled by Numba; see ``run`` for how threads share them."""
