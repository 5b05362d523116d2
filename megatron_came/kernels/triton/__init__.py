"""The kernels for GPUs, in Triton: all in place, none autotuned."""
