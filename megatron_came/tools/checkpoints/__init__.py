"""What ``megatron-came inspect`` and ``repair`` do with a checkpoint."""
