"""The kernels for GPUs, in Triton; none is autotuned, since they change weights in place."""
