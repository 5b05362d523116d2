"""``megatron-came compare``: one model, the same weights and data, several optimizers."""
