"""What a case runs instead of CAME as it is: the authors' optimizer, or CAME with a deliberate fault."""

import contextlib
from unittest import mock

import came_pytorch

from megatron_came import comm


class Oracle(came_pytorch.CAME):
    """The authors' class where the host builds CAME, on one rank, which holds whole tensors."""

    def set_shards(self, shards):
        if any(shard.tp_size > 1 or shard.dp_group is not None for shard in shards.values()):
            raise ValueError("the oracle knows no shards")


def _without_sums_over(kind: str):
    original = comm.SumBuffer.__init__

    def __init__(self, requests, device):
        requests = [comm.Request(**{**{f: getattr(r, f) for f in _FIELDS}, kind: None}) for r in requests]
        original(self, requests, device)

    return mock.patch.object(comm.SumBuffer, "__init__", __init__)


_FIELDS = ("shape", "dp_group", "tp_group", "copies_group")


def apply(name: str, stack: contextlib.ExitStack, seen: dict) -> None:
    """Enter the patches of a variant."""
    from megatron_came.host import building

    if name == "oracle":
        stack.enter_context(mock.patch.object(building, "CAME", Oracle))
    elif name == "no_dp_sum":
        stack.enter_context(_without_sums_over("dp_group"))
    elif name == "no_tp_sum":
        stack.enter_context(_without_sums_over("tp_group"))
    elif name != "came":
        raise ValueError(f"unknown variant {name}")
