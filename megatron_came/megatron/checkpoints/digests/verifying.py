"""What has been loaded is compared with the digests of what was saved, before training starts.

Weights are looked at between the loading of the model and that of the optimizer, which writes fp32
weights once more; momentum and main weights as they were read, before they are rounded to the dtype
of this run; factors where they have come to lie.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_came.checkpoint_files.claims import by_key, named_parts
from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS
from megatron_came.core.momentum import MOMENTUM as MOMENTUM_KEY
from megatron_came.core.saved import main_ranges, momentum_ranges, pieces
from megatron_came.core.state import FACTORS
from megatron_came.dtensors import local_of, state_here
from megatron_came.megatron.checkpoints.digests.damage import Found, Source, judge
from megatron_came.megatron.checkpoints.digests.leaves import (
    Entry,
    entries_of,
    untrained,
    unwrapped,
)
from megatron_came.megatron.checkpoints.digests.saving import (
    counts,
    has_main_weights,
    is_sliced,
    steps_of,
    wrappers_of,
)
from megatron_came.megatron.checkpoints.digests.sums import (
    FP8,
    Names,
    Sums,
    distinct,
    in_one_range,
)
from megatron_came.megatron.checkpoints.folders import tensors_in
from megatron_came.megatron.quantized import is_quantized
from megatron_came.optimizer import CAME
from megatron_came.voice import end_if, rank, say, stop, world_size

_current: ContextVar["Verification | None"] = ContextVar("verification", default=None)


@contextlib.contextmanager
def verified(model: Any, optimizer: Any, args: Any) -> Iterator[None]:
    """Compare what is loaded meanwhile with the digests that were saved with it.

    Raises:
        SystemExit: on all ranks, where something differs.
    """
    if args.optimizer != "came" or getattr(args, "came_no_verify", False):
        yield
        return
    verification = Verification(unwrapped(model), optimizer, args)
    token = _current.set(verification)
    try:
        yield
    finally:
        _current.reset(token)
    verification.finish()


def note_files(loaded: Sequence[Any], folder: str, *, first_look: bool) -> None:
    """Tell the verification under way, if any, what ``_load_base_checkpoint`` has read of a folder.

    The first look is at the settings alone.
    """
    verification, (state, _, is_release, _) = _current.get(), loaded
    if verification is not None and state is not None:
        source = Source(loaded, folder)
        # Of ``torch`` that is the file of rank 0, and this rank's own comes later.
        if not (first_look and source.is_legacy):
            verification.check(source, is_release=bool(is_release))
        verification.has_begun = not first_look


class Verification:
    """A checkpoint that is being loaded, and the sums of what was read of it.

    Attributes:
        has_begun: whether the files have been read.
    """

    def __init__(self, model_chunks: Sequence[Any], optimizer: Any, settings: Any) -> None:
        self._chunks, self._settings = model_chunks, settings
        self._wrappers = wrappers_of(optimizer)
        self._has_weights = self._has_optimizer = False
        self._source: Source | None = None
        self.has_begun = False
        self._cast: list[str] = []

    def check(self, source: Source, *, is_release: bool) -> None:
        """Look at what a checkpoint says of itself, before anything is filled from it."""
        if self._source is not None:
            return  # Megatron reads a distributed one twice, its common state first and alone
        self._source = source
        afresh = self._settings.finetune or is_release  # Megatron then loads weights alone
        problem = source.problem(
            finetune=afresh,
            reads_metadata=rank() == 0,  # all ranks share the file
            with_optimizer=not (afresh or self._settings.no_load_optim),
        )
        # A collective, so that all ranks end with the same sentence.
        seen = distinct((problem, source.file, source.identity))
        for found in filter(None, (problem for problem, _, _ in seen)):
            stop(found)
        other = next((file for _, file, identity in seen if identity != seen[0][2]), None)
        if other is not None:
            files = f"its files {seen[0][1]} and {other}"
            stop(source.damaged(f"{files} are not of one and the same save"))

    @cached_property
    def _entries(self) -> dict[int, Entry]:
        return entries_of(self._chunks)

    @cached_property
    def _sums(self) -> Sums:
        return Sums(self._entries, is_loaded=True)

    @property
    def _reads_fp8(self) -> bool:
        """Whether weights in fp8 are compared as files have them, before they are quantised."""
        source = self._source
        return source is not None and source.record is not None and Path(source.file).is_dir()

    def _add_fp8(self, source: Source, names: Names) -> Names:
        """Add up weights that lie in fp8, from the files, of which each rank reads some.

        Returns:
            The names, with the dtype that the files have.
        """
        saved = source.record.tensors.get(WEIGHTS, {}) if source.record else {}
        wanted = by_key(name for name, _, dtype in names if dtype == FP8 and name in saved)
        if not wanted or not self._reads_fp8:
            return names
        problem = None
        try:
            chunks = [
                (tensor, chunk)
                for tensor in tensors_in(source.file)
                if tensor.kind == WEIGHTS and tensor.key in wanted
                for chunk in tensor.chunks
            ]
            for tensor, chunk in chunks[rank() :: world_size()]:  # each of the files once
                for box in tensor.boxes(chunk):
                    for name, values, offset in named_parts(box, wanted[tensor.key]):
                        self._sums.add_box(name, values, offset, saved[name].shape)
        except (CheckpointError, OSError) as error:  # of one rank: all are to hear of it
            problem = str(error)
        end_if(problem)
        return tuple(
            (name, shape, saved[name].dtype if dtype == FP8 and name in saved else dtype)
            for name, shape, dtype in names
        )

    def note_optimizer(self) -> None:
        """The optimizer is about to be loaded."""
        self._has_optimizer = True
        self.note_weights()  # before it writes those in fp32 once more

    @torch.no_grad()
    def note_weights(self) -> None:
        """Add up the model's weights, the first time that this is called."""
        if not self._has_weights:
            self._has_weights = True
            entries, frozen = self._entries, untrained(self._chunks)
            for key, entry in entries.items():
                if not (self._reads_fp8 and is_quantized(entry.tensor)):
                    self._sums.add_weights(entry, is_trained=key not in frozen)
            self._sums.flush()

    @torch.no_grad()
    def note_slice(self, wrapper: Any, param: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Add up what a distributed optimizer has read of a parameter."""
        entry = self._entries.get(id(param))
        if entry is None or not counts(wrapper):
            return
        start, stop = wrapper._range_of(param)
        main, momentum = tensors["param"], tensors[MOMENTUM_KEY]
        for kind, values in ((MAIN_WEIGHTS, main), (MOMENTUM, momentum)):
            self._sums.add_slice((kind,), entry, in_one_range(values), start)
        self._sums.flush()
        # How main weights are rounded to fp8, Transformer Engine alone knows.
        if not is_quantized(param):
            self._compare(entry, param.detach().view(-1)[start:stop], main)

    @torch.no_grad()
    def note_whole(self, came: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Add up the momentum that an optimizer of whole tensors has read."""
        (wrapper,) = (one for one in self._wrappers if one.optimizer is came)
        if is_sliced(wrapper):
            return  # it reads slices, see above
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = {id(local): id(param) for param, local in wrapper._pairs}
        mine = chain.from_iterable(group["params"] for group in came.param_groups)
        for key, local in zip(saved, mine, strict=False):  # what does not fit is said by CAME
            state = state_here(state_dict["state"].get(key, {}))
            entry = self._entries.get(params[id(local)])
            if entry is not None and MOMENTUM_KEY in state:
                self._sums.add_slice((MOMENTUM,), entry, momentum_ranges(state), entry.start)
                self._note_dtypes(entry, state)
        self._sums.flush()

    def _note_dtypes(self, entry: Entry, state: Mapping[str, Tensor]) -> None:
        for key in FACTORS:
            if key in state and state[key].dtype != torch.float32:
                dtype = str(state[key].dtype).removeprefix("torch.")
                self._cast.append(f"{key} of {entry.leaves[0].name} in {dtype}")

    def _compare(self, entry: Entry, weights: Tensor, main: Tensor) -> None:
        """Count where weights are not their main weights, rounded."""
        source = self._source
        if source is None or source.record is not None or source.rounded is None:
            return  # digests prove more
        for begin, some in pieces(main):
            # With --optimizer-cpu-offload main weights are on the CPU.
            mine, some = weights.reshape(-1)[begin : begin + some.numel()], some.to(weights.device)
            # By distance, since of a number halfway between two ranks may hold either.
            off = (some - mine.float()).abs() > (some - some.to(source.rounded).float()).abs()
            self._sums.differing[entry.leaves[0].name] += int(off.sum())

    @torch.no_grad()
    def finish(self) -> None:
        """Compare, on all ranks.

        Raises:
            SystemExit: on all ranks, where something differs.
        """
        source = self._source
        if source is None:
            return  # there was no checkpoint
        self.note_weights()
        mine = self._has_optimizer, steps_of(self._wrappers), self._cast, self._sums.names
        flags, steps, cast, names = zip(*distinct(mine), strict=True)
        has_optimizer = any(flags)  # a rank that trains nothing loads no state
        for wrapper in self._wrappers if has_optimizer else ():
            self._add_rest(wrapper)
        named = self._add_fp8(source, tuple(chain(*names)))
        found = Found(
            totals=self._sums.over_all_ranks(named),
            has_optimizer=has_optimizer,
            steps=set(chain(*steps)),
            cast=list(dict.fromkeys(chain(*cast))),
            holders=lambda: distinct((source.file, self._sums.held)),
        )
        problem, remarks = judge(source, found)
        for remark in remarks:
            say(remark)
        if problem:
            stop(problem)

    def _add_rest(self, wrapper: Any) -> None:
        """Add factors, and the main weights of an optimizer of whole tensors."""
        for param, local in wrapper._pairs:
            entry = self._entries.get(id(param))
            if entry is None:
                continue
            state, main = state_here(wrapper.optimizer.state[local]), local_of(local)
            self._sums.add_factors(entry, state)
            if not is_sliced(wrapper) and has_main_weights(param, local):
                self._sums.add_slice((MAIN_WEIGHTS,), entry, main_ranges(main, state), None)
                self._compare(entry, local_of(param).detach(), main.detach())


def note_slice(wrapper: Any, param: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Tell the verification under way, if any, what a distributed optimizer has read."""
    verification = _under_way()
    if verification is not None:
        verification.note_slice(wrapper, param, tensors)


@contextlib.contextmanager
def watched(came: CAME) -> Iterator[None]:
    """Tell the verification under way, if any, what is read while an optimizer is loaded."""
    verification = _under_way()
    if verification is None:
        yield
        return
    verification.note_optimizer()
    hook = came.register_load_state_dict_pre_hook(verification.note_whole)
    try:
        yield
    finally:
        hook.remove()


def _under_way() -> Verification | None:
    """The current verification, once the files have been read.

    Before, Megatron loads an optimizer from itself, to create its state.
    """
    current = _current.get()
    return current if current is not None and current.has_begun else None
