"""Fused twins of the passes of a step, with which a few launches serve all parameters.

``dispatch`` decides who computes a step, ``backend`` is what backends have in common, ``eager``
the one in plain PyTorch. ``triton`` has the kernels for GPUs, ``cpu`` those for CPUs; nothing else
imports Triton or Numba.
"""
