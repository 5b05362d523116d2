"""Layers, or experts, that a checkpoint holds in one tensor, of which some are frozen.

Megatron asks such a tensor to be whole. Of its own default format only CAME's factors stand so,
and each layer's are saved alone; state of the other formats Megatron cannot save, of any optimizer.
"""

from collections.abc import Sequence
from typing import Any

from megatron_came.dtensors import local_of
from megatron_came.megatron.checkpoints.digests.leaves import unwrapped
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import ALONE, boxes_in, sharded_entries
from megatron_came.rules import Settings
from megatron_came.voice import Groups, by_rank, of_any_rank, some


def mark(model_chunks: Sequence[Any], settings: Any, everyone: Groups) -> None:
    """Mark the parameters of which a checkpoint holds the factors alone; a collective.

    Raises:
        UnsupportedError: on all ranks, if the optimizer's state could not be saved or loaded.
    """
    params = [param for chunk in model_chunks for param in chunk.parameters()]
    for param in params:
        vars(param).pop(ALONE, None)  # from an optimizer before this one
    is_frozen = not all(param.requires_grad for param in params)
    if of_any_rank("some" if is_frozen else None, groups=everyone) is None:
        return
    owners = {id(local_of(param)): param for param in params}
    stacked = [
        (leaf.key, owners[id(entry.data)])
        for chunk in unwrapped(list(model_chunks))
        if hasattr(chunk, "sharded_state_dict")  # a host's model may have none
        for entry in sharded_entries(chunk.sharded_state_dict())
        for leaf in boxes_in(entry)
        if leaf.prepend_axis_num and id(entry.data) in owners
    ]
    mine = [[key for key, p in stacked if p.requires_grad == trained] for trained in (True, False)]
    trained, frozen = (
        {key for keys in each for key in keys}
        for each in zip(*by_rank(mine, everyone).values(), strict=True)
    )
    parted = trained & frozen
    if parted and (problem := _problem(Settings(settings))):
        raise UnsupportedError(
            f"--optimizer came: of {some(sorted(parted))} some layers or experts are frozen and "
            f"some are not, whose optimizer state Megatron can neither save nor load {problem}."
        )
    for key, param in stacked:
        setattr(param, ALONE, key in parted)


def _problem(s: Settings) -> str | None:
    """Say with which flags Megatron holds an optimizer's whole state in such tensors, or None."""
    saves = s.save and not s.no_save_optim
    loads = s.load and not (s.no_load_optim or s.finetune)
    if s.ckpt_format != "torch_dist" or not (saves or loads):
        return None
    if not s.use_distributed_optimizer:
        return "without --use-distributed-optimizer: add it, or use --ckpt-format torch"
    if s.dist_ckpt_optim_fully_reshardable:
        return "with --dist-ckpt-optim-fully-reshardable: leave it out, or use --ckpt-format torch"
    return None
