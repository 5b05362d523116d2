"""What a case runs instead of CAME: the authors' optimizer, or CAME with a deliberate fault."""

import contextlib
from unittest import mock

import came_pytorch

from megatron_came import comm


class Oracle(came_pytorch.CAME):
    """The authors' class where the host builds CAME, on one rank, which holds whole tensors."""

    def set_shards(self, shards):
        if any(shard.tp_size > 1 or shard.dp_group is not None for shard in shards.values()):
            raise ValueError("the oracle knows no shards")

    def init_state(self):
        """Its state is created at the first step."""


def _without_sums_over(kind: str):
    original = comm.SumBuffer.__init__

    def without(self, requests, device):
        requests = [
            comm.Request(**{**{f: getattr(r, f) for f in _FIELDS}, kind: None}) for r in requests
        ]
        original(self, requests, device)

    return mock.patch.object(comm.SumBuffer, "__init__", without)


_FIELDS = ("shape", "dp_group", "tp_group", "copies_group")


def _frozen():
    """Models whose first layer is frozen."""
    from megatron.core.models.gpt import GPTModel

    original = GPTModel.__init__

    def frozen(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for name, param in self.named_parameters():
            if ".layers.0." in name:
                param.requires_grad = False

    return mock.patch.object(GPTModel, "__init__", frozen)


def apply(name: str, stack: contextlib.ExitStack) -> None:
    """Enter the patches of a variant."""
    from megatron_came.host import building

    patches = {
        "came": contextlib.nullcontext,
        "oracle": lambda: mock.patch.object(building, "CAME", Oracle),
        "frozen": _frozen,
        "no_dp_sum": lambda: _without_sums_over("dp_group"),
        "no_tp_sum": lambda: _without_sums_over("tp_group"),
    }
    stack.enter_context(patches[name]())
