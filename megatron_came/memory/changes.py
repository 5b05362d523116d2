"""What can be changed of a launch to make it smaller, and what each change costs."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_came.megatron.arguments import FLAGS as CAME_FLAGS
from megatron_came.memory.grid import Grid
from megatron_came.memory.megatron_flags import PRECISE_DTYPES
from megatron_came.memory.optimizers import has_fsdp
from megatron_came.memory.prediction import Launch
from megatron_came.terminal.console import counted

ADAM, CAME = OPTIMIZERS = ("Adam", "CAME")

_SHARDED = "--use-distributed-optimizer"
_PRECISE = "--use-precision-aware-optimizer"
_DTYPES = PRECISE_DTYPES[:3]  # of what Adam keeps
_RECOMPUTED = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
_OFFLOAD = ("--optimizer-cpu-offload",)
_SEQUENCE = "--sequence-parallel"
_CUT_ANYWAY = ("--distribute-saved-activations",)  # by sequence parallelism, which refuses it
_ANOTHER = "another optimizer, whose rate has to be found"


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a launch."""

    kind: str  # what is changed
    flags: tuple[str, ...]  # to add, in place of those of the same names
    cost: str  # in a few words
    name: str = ""  # of the optimizer that it brings
    without: tuple[str, ...] = ()  # names of flags to take out
    ranks: int | None = None  # number of ranks, where that is changed

    def applied(self, flags: Iterable[str]) -> list[str]:
        """The flags of the changed launch."""
        names = {word for word in self.flags if word.startswith("--")}
        kept = [flag for flag in _flags(flags) if flag[0] not in names.union(self.without)]
        return [word for flag in kept for word in flag] + [*self.flags]

    def said(self, flags: Iterable[str]) -> str:
        """What is to be done, in words."""
        given = {flag[0]: flag for flag in _flags(flags)}
        added = [" ".join(flag) for flag in _flags(self.flags) if given.get(flag[0]) != flag]
        if self.ranks is not None:
            added.append(f"{counted(self.ranks, 'GPU')}, with data parallelism")
        names = {flag[0] for flag in _flags(self.flags)}
        gone = [name for name in given if name in self.without and name not in names]
        return " ".join(added) + (f", without {' and '.join(gone)}" if gone else "")


def _flags(words: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Cut a command line into flags, each with its values."""
    flag: list[str] = []
    for word in words:
        if word.startswith("--"):
            if flag:
                yield tuple(flag)
            flag = word.split("=", 1)
        else:
            flag.append(word)
    if flag:
        yield tuple(flag)


def changes(launch: Launch, micro_batch: int | None, ranks: int | None) -> list[Change]:
    """List what may make a launch smaller, what costs least first.

    Args:
        launch: the run as it is.
        micro_batch: the largest micro-batch size that fits, if one does.
        ranks: the fewest ranks that fit, likewise.
    """
    args, grid = launch.args, launch.grid
    found: list[Change] = []
    if grid.data * grid.context > 1 and not grid.sharded:
        found.append(Change("sharding", (_SHARDED,), "nothing: the same numbers and traffic"))
    if grid.tensor > 1 and not args.sequence_parallel:
        cost = "nothing: as much traffic"
        found.append(Change("sequence", (_SEQUENCE,), cost, without=_CUT_ANYWAY))
    if not (args.bf16 or args.fp16):
        found.append(Change("precision", ("--bf16",), "16-bit arithmetic; main weights stay fp32"))
    families = {ADAM: _adams(args), CAME: _cames(args)}
    found += families.pop(CAME if args.optimizer == "came" else ADAM)
    if args.accumulate_allreduce_grads_in_fp32 or not args.bf16:
        cost = "gradients are added up in bf16, over micro-batches and ranks"
        found.append(Change("gradients", ("--grad-reduce-in-bf16",), cost))
    if args.micro_batch_size > 1:
        cost = "smaller matrix products, so that GPUs do less at a time"
        size = min(micro_batch or 1, args.micro_batch_size)
        found.append(Change("micro-batch", ("--micro-batch-size", f"{size}"), cost))
    found += [change for family in families.values() for change in family]
    if args.recompute_granularity != "full":
        cost = "the forward pass runs twice: about a third more arithmetic"
        without = ("--recompute-activations", "--recompute-modules", "--moe-layer-recompute")
        found.append(Change("recomputation", _RECOMPUTED, cost, without=without))
    if args.optimizer == "came" and not args.optimizer_cpu_offload:
        cost = "gradients and weights cross to the CPU and back, and its kernels are slower"
        found.append(Change("offload", (_SHARDED, *_OFFLOAD), cost))
    found += _layouts(args, grid)
    if ranks is not None and ranks > grid.world:
        found.append(Change("ranks", (), f"{counted(ranks - grid.world, 'GPU')} more", ranks=ranks))
    return found


def _adams(args: argparse.Namespace) -> Iterator[Change]:
    """Adam in the forms that Megatron has, from the largest on."""
    is_other, without = args.optimizer != "adam", (*CAME_FLAGS, *_DTYPES, _PRECISE, *_OFFLOAD)
    if is_other:
        yield Change(ADAM, ("--optimizer", "adam"), _ANOTHER, "AdamW", without)
    for dtype, name, cost in (
        ("fp32", "16-bit remainders", "the same numbers"),
        ("bf16", "bf16 moments", "moments are rounded to bf16"),
        ("fp8", "fp8 moments", "moments are rounded to fp8"),
    ):
        flags: tuple[str, ...] = (_SHARDED, _PRECISE)
        if is_other:
            flags = ("--optimizer", "adam", *flags)
        if dtype != "fp32":  # Megatron's default
            flags += ("--exp-avg-dtype", dtype, "--exp-avg-sq-dtype", dtype)
        cost = f"Transformer Engine is needed; {cost}" + (f"; {_ANOTHER}" if is_other else "")
        yield Change(ADAM, flags, cost, f"Adam with {name}", without)


def _cames(args: argparse.Namespace) -> Iterator[Change]:
    """CAME in its modes, from the largest on; of a launch with CAME, in those that are smaller."""
    without = (_PRECISE, *PRECISE_DTYPES, "--came-momentum-dtype", "--came-main-params")
    is_other = args.optimizer != "came"
    modes = ["fp32", "bf16", "int8"]
    own: tuple[str, ...] = ("--optimizer", "came")
    if args.bf16 and not args.accumulate_allreduce_grads_in_fp32:
        own += ("--grad-reduce-in-bf16",)  # also where --main-grads-dtype said so
    if is_other:
        yield Change(CAME, own, _ANOTHER, "CAME", without)
    for momentum in modes if is_other else modes[modes.index(args.came_momentum_dtype) :]:
        flags = own
        cost = "the same numbers"
        if momentum != "fp32":
            flags += ("--came-momentum-dtype", momentum)
            cost = f"momentum is rounded to {momentum}, stochastically"
        cost += f"; {_ANOTHER}" if is_other else ""
        if args.bf16 and not has_fsdp(args):
            flags += (_SHARDED, "--came-main-params", "remainder")
        yield Change(CAME, flags, cost, f"CAME with {momentum} momentum", without)


def _layouts(args: argparse.Namespace, grid: Grid) -> Iterator[Change]:
    """More tensor, pipeline and expert parallelism on the same ranks."""
    for size in _doubled(grid.tensor, 8):  # GPUs of a node
        flags: tuple[str, ...] = ("--tensor-model-parallel-size", f"{size}", _SEQUENCE)
        cost = "traffic in every layer: keep it inside a node"
        yield Change("tensor", flags, cost, without=_CUT_ANYWAY)
    for size in _doubled(grid.pipeline, args.num_layers):
        data = max(1, grid.world // (grid.tensor * grid.context * size))
        count = max(1, args.global_batch_size // (args.micro_batch_size * data))
        flags = ("--pipeline-model-parallel-size", f"{size}")
        # At the start and the end of a step, while micro-batches travel through the stages.
        waits = f"GPUs wait {(size - 1) / (count + size - 1):.0%} of the time, without interleaving"
        yield Change("pipeline", flags, waits)
    for size in _doubled(grid.expert, args.num_experts or 1):
        flags = ("--expert-model-parallel-size", f"{size}")
        yield Change("experts", flags, "tokens travel between more GPUs")


def _doubled(size: int, most: int) -> Iterator[int]:
    while 2 * size <= most:
        size *= 2
        yield size
