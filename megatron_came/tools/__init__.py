"""Commands of ``megatron-came``."""
