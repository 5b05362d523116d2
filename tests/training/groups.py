"""Process groups of one case among many that run in the same processes."""

import os

import torch.distributed as dist


def meet() -> dist.TCPStore:
    """The store that torchrun serves."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False)


def connect(name: str, store: dist.TCPStore) -> None:
    """Start process groups of the case's own, which Megatron takes as it finds them."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prefix = dist.PrefixStore(name, store)
    dist.init_process_group("gloo", store=prefix, rank=rank, world_size=world_size)
