"""``megatron-came bench``: a step of CAME beside a step of its peers, on the same numbers."""
