"""Reads files of checkpoints without running anything that stands in them.

Nothing here imports Megatron, asks for a process group or calls ``torch.load``: a file is data, and
what its pickles name is looked up in a table of this package alone.
"""
