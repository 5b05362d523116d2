"""Fused twins of the passes of a step: one call, or a few, for all parameters of a chunk.

``choice`` decides who computes a step, ``fused`` is the order of the kernels and what lies between
them, ``tables`` is what they read. ``triton`` has those for GPUs, ``numba`` those for CPUs; nothing
else imports Triton or Numba.
"""
