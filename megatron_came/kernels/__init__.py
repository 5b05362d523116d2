"""Fused twins of the passes of a step, with which a few launches serve all parameters.

``choice`` decides who computes a step, ``fused`` is the passes, ``schedule`` what they launch,
``cutting`` what matrices are cut into and ``tables`` what kernels read. ``triton`` has the kernels
for GPUs, ``numba`` those for CPUs, which run on ``threads``; nothing else imports Triton or Numba.
"""
