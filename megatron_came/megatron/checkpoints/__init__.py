"""What CAME adds to the checkpoints of Megatron, and what it refuses to load."""
