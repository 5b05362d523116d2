"""Layers, or experts, that a checkpoint holds in one tensor, of which some are frozen or shared.

Megatron asks such a tensor to be whole. Of its own default format only CAME's factors stand so,
and each layer's are saved alone; state of the other formats Megatron cannot save, of any optimizer.
Of layers with the same weights it has the state under the name of one, in all of ``torch_dist``.
"""

from collections import Counter
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
    named = [each for c in model_chunks for _, each in c.named_parameters(remove_duplicate=False)]
    is_odd = is_frozen or len(named) > len(set(named))
    if of_any_rank("some" if is_odd else None, groups=everyone) is None:
        return
    owners = {id(local_of(param)): param for param in params}
    entries = [
        entry
        for chunk in unwrapped(list(model_chunks))
        for entry in sharded_entries(_sharded_state(chunk))
        if id(entry.data) in owners
    ]
    stacked = [
        (leaf.key, owners[id(entry.data)])
        for entry in entries
        for leaf in boxes_in(entry)
        if leaf.prepend_axis_num
    ]
    # A gated projection is one entry, of two boxes.
    times = Counter(owners[id(entry.data)] for entry in entries)
    mine = (
        [key for key, param in stacked if param.requires_grad],
        [key for key, param in stacked if not param.requires_grad],
        [key for key, param in stacked if param.requires_grad and times[param] > 1],
    )
    trained, frozen, shared = (
        {key for keys in each for key in keys}
        for each in zip(*by_rank(mine, everyone).values(), strict=True)
    )
    parted = trained & frozen
    for keys, are, problem in (
        (parted, "frozen and some are not", _problem_of_parted),
        (shared, "the same weights", _problem_of_shared),
    ):
        if keys and (how := problem(Settings(settings))):
            raise UnsupportedError(
                f"--optimizer came: of {some(sorted(keys))} some layers or experts are {are}, "
                f"whose optimizer state cannot be saved or loaded {how}."
            )
    for key, param in stacked:
        setattr(param, ALONE, key in parted)


def _sharded_state(chunk: Any) -> Any:
    try:
        return chunk.sharded_state_dict()
    except Exception:  # a host's model may have none, or not yet; whoever saves it is told why
        return {}


def _is_saved_by_name(s: Settings) -> bool:
    saves = s.save and not s.no_save_optim
    loads = s.load and not (s.no_load_optim or s.finetune)
    return s.ckpt_format == "torch_dist" and bool(saves or loads)


def _problem_of_parted(s: Settings) -> str | None:
    """Say with which flags Megatron holds an optimizer's whole state in such tensors, or None."""
    if not _is_saved_by_name(s):
        return None
    if not s.use_distributed_optimizer:
        return "without --use-distributed-optimizer: add it, or use --ckpt-format torch"
    if s.dist_ckpt_optim_fully_reshardable:
        return "with --dist-ckpt-optim-fully-reshardable: leave it out, or use --ckpt-format torch"
    return None


def _problem_of_shared(s: Settings) -> str | None:
    return "with --ckpt-format torch_dist: use torch" if _is_saved_by_name(s) else None
