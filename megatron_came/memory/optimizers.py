"""What a rank's memory is counted under, and what each optimizer keeps of an element."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from megatron_came.core.int8 import BLOCK

# Fields of Components, in the order of the tables.
LABELS = {
    "weights": "model weights",
    "gradients": "gradients",
    "main_weights": "main weights",
    "momentum": "momentum",
    "second_moment": "second moment or factors",
    "buffers": "communication and scratch",
}
# The same with their sum, of which buffers are none.
ROWS = {**{key: LABELS[key] for key in LABELS if key != "buffers"}, "static": "static"}
ROWS["buffers"] = LABELS["buffers"]
HOST = "on the CPU, offloaded"


@dataclass(frozen=True, slots=True)
class Components:
    """Bytes of the tensors that one rank keeps from step to step."""

    weights: int  # parameters of the model, with the padding of the distributed optimizer's buffers
    gradients: int  # Megatron's gradient buffers, likewise
    main_weights: int  # fp32 copies of 16-bit weights, or the remainders that replace them
    momentum: int  # of all optimizers, int8's scales included
    # Adam's, or the factors of CAME and Adafactor with the second moments of vectors.
    second_moment: int
    # CAME's sums over ranks, and fp32 copies of 16-bit gradients, which live from an optimizer step
    # to the next iteration.
    buffers: int
    host: int = 0  # what is on the CPU with ``--optimizer-cpu-offload``, and not in the others

    @property
    def static(self) -> int:
        """Weights, gradients and state: all but ``buffers``."""
        return self.total - self.buffers

    @property
    def state(self) -> int:
        """What the optimizer keeps."""
        return self.main_weights + self.momentum + self.second_moment

    @property
    def total(self) -> int:
        """All of them on the GPU."""
        return sum(getattr(self, key) for key in LABELS)


# Bytes of an element of momentum, and of the fp32 scale that a block of int8 elements shares.
MOMENTUM = {
    "fp32": (4, 0),
    "bf16": (2, 0),
    "fp16": (2, 0),
    "fp8": (1, 0),
    "int8": (1, 4),
    "none": (0, 0),
}
# Beside 16-bit weights; a remainder is the 16 bits that they lack of fp32.
MAIN_WEIGHTS = {"fp32": 4, "fp16": 2, "remainder": 2}


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer keeps of each parameter."""

    name: str  # heads its column
    momentum: str  # a key of ``MOMENTUM``
    # A key of ``MOMENTUM``; or "factors", which are r and c of matrices and v of vectors; or
    # "confidence", CAME's, which has R and C beside them.
    second_moment: str
    main_weights: str = "fp32"  # a key of ``MAIN_WEIGHTS``
    copies_gradients: bool = True  # whether 16-bit gradients are copied to fp32
    # Whether a step, and a checkpoint, copy moments and main weights of fewer bits to fp32, all at
    # once.
    unpacks: bool = False
    offloads: bool = False  # whether some of it is on the CPU
    # The optimizer of word embeddings, output layer and vectors, where that is another; each tensor
    # then lies whole on one data-parallel rank.
    rest: Optimizer | None = None
    # Whether a step keeps r, c and v of before, to be put back after a spike.
    steps_back: bool = False

    @property
    def is_came(self) -> bool:
        """Whether it is CAME, in any mode."""
        return self.second_moment == "confidence"

    def unpacked(self, in_step: bool) -> int:
        """Bytes of an element's fp32 copies, in a step or at a checkpoint."""
        moments = (self.momentum, self.second_moment)
        # Kernels of Transformer Engine 2.14 and newer read two in bf16 as they are.
        are_read = in_step and moments == ("bf16", "bf16")
        copied = (self.main_weights,) if are_read else (*moments, self.main_weights)
        return sum(4 for each in copied if self.unpacks and each not in ("fp32", "remainder"))

    def momentum_bytes(self, elements: float, blocks: float) -> float:
        """Bytes of the momentum of so many elements, in so many blocks of int8."""
        element, scale = MOMENTUM[self.momentum]
        return elements * element + blocks * scale

    @property
    def moment_bytes(self) -> int:
        """Bytes of an element of the second moment; none of factors."""
        return MOMENTUM.get(self.second_moment, (0, 0))[0]

    def main_weights_bytes(self, weight: int) -> int:
        """Bytes of main weights beside a weight of so many bytes."""
        return MAIN_WEIGHTS[self.main_weights] if weight == 2 else 0

    def state_per_element(self, weight: int) -> float:
        """Bytes that it keeps of an element beside a weight of so many; no factors."""
        kept = self.main_weights_bytes(weight) + self.moment_bytes
        return kept + self.momentum_bytes(1, 1 / BLOCK)


def came(args: argparse.Namespace, momentum: str = "fp32", main_weights: str = "fp32") -> Optimizer:
    """CAME with a precision of momentum and a form of main weights."""
    # See CameDistributedOptimizer: there gradients are read where Megatron has reduced them.
    reads_bf16 = args.bf16 and is_sharded(args) and not getattr(args, "use_megatron_fsdp", False)
    return Optimizer(
        name=f"CAME {momentum}" + (" + rem." if main_weights == "remainder" else ""),
        momentum=momentum,
        second_moment="confidence",
        main_weights=main_weights,
        copies_gradients=not reads_bf16 or bool(args.loss_scale),
        steps_back=getattr(args, "came_spike_guard", None) is not None,
        offloads=args.optimizer_cpu_offload,
    )


ADAMW = Optimizer("AdamW", momentum="fp32", second_moment="fp32")
ADAFACTOR = Optimizer("Adafactor", momentum="none", second_moment="factors")
_LION = Optimizer("Lion", momentum="fp32", second_moment="none")


def precision_aware(
    momentum: str, second_moment: str, main_weights: str, copies_gradients: bool = False
) -> Optimizer:
    """Transformer Engine's Adam, as ``--use-precision-aware-optimizer`` has it."""
    dtypes = "/".join(dict.fromkeys((momentum, second_moment)))
    main = {"remainder": " + rem.", "fp16": " + fp16 main"}.get(main_weights, "")
    name = f"Adam {dtypes}{main}"
    return Optimizer(name, momentum, second_moment, main_weights, copies_gradients, unpacks=True)


def by_matrix(name: str, rest: Optimizer = ADAMW) -> Optimizer:
    """Lion or Muon as Megatron builds them: words, output layer and vectors are another's."""
    return Optimizer(name, momentum="fp32", second_moment="none", rest=rest)


def sgd(args: argparse.Namespace) -> Optimizer:
    """Megatron's SGD, which has momentum unless ``--sgd-momentum 0``."""
    return Optimizer("SGD", "fp32" if args.sgd_momentum else "none", second_moment="none")


def compared(args: argparse.Namespace) -> list[Optimizer]:
    """The columns of a prediction: CAME in every precision, and the others."""
    # Of CAME with FSDP on tensor-parallel ranks, and with Megatron's, the momentum is fp32.
    is_fp32 = has_fsdp(args) and (args.use_megatron_fsdp or args.tensor_model_parallel_size > 1)
    precisions = ("fp32",) if is_fp32 else ("fp32", "bf16", "int8")
    columns = [came(args, momentum) for momentum in precisions]
    if has_fsdp(args):
        return [*columns, ADAMW]
    if args.bf16 and is_sharded(args):
        columns.append(came(args, "int8", "remainder"))
    columns.append(ADAMW)
    if args.bf16 and is_sharded(args):
        columns += [precision_aware(dtype, dtype, "remainder") for dtype in ("bf16", "fp8")]
    if "factored=" not in str(getattr(args, "came_rule", "")):  # the factors counted are CAME's
        columns.append(ADAFACTOR)
    columns.append(sgd(args))
    if not args.fp16:  # with which Megatron refuses them
        columns += [by_matrix("Lion"), by_matrix("Muon")]
    return columns


def of_launch(args: argparse.Namespace) -> Optimizer | None:
    """The optimizer that a launch asks for; None for one that is not compared here."""
    if args.optimizer == "came":
        return came(args, args.came_momentum_dtype, args.came_main_params)
    if args.optimizer == "adam" and args.use_precision_aware_optimizer:
        return _precision_aware_of(args)
    rest = _LION if args.optimizer == "muon" and args.muon_scalar_optimizer == "lion" else ADAMW
    known = {"lion": by_matrix("Lion"), "muon": by_matrix("Muon", rest)}
    return {"adam": ADAMW, "sgd": sgd(args), **known}.get(args.optimizer)


def _precision_aware_of(args: argparse.Namespace) -> Optimizer:
    names = {torch.uint8: "fp8", torch.float16: "fp16", torch.bfloat16: "bf16"}
    kept = (args.exp_avg_dtype, args.exp_avg_sq_dtype, args.main_params_dtype)
    momentum, second_moment, main_weights = (names.get(dtype, "fp32") for dtype in kept)
    if main_weights != "fp32":
        return precision_aware(momentum, second_moment, main_weights)
    # With other recipes of fp8 Megatron keeps main weights and copies gradients, as usual.
    has_own = getattr(args, "fp8_recipe", None) in (None, "delayed")
    form = "remainder" if has_own and args.bf16 else "fp32"
    return precision_aware(momentum, second_moment, form, copies_gradients=not has_own)


def is_sharded(args: argparse.Namespace) -> bool:
    """Whether data-parallel ranks share the optimizer's state."""
    # Megatron's validation turns the first into the second for Lion and Muon.
    return bool(
        args.use_distributed_optimizer
        or getattr(args, "use_layer_wise_distributed_optimizer", False)
    )


def has_fsdp(args: argparse.Namespace) -> bool:
    """Whether data-parallel ranks hold parts of weights or gradients, too."""
    return any(getattr(args, name, False) for name in ("use_torch_fsdp2", "use_megatron_fsdp"))


def name_of_fsdp(args: argparse.Namespace) -> str:
    """The kind of FSDP that a launch with one has, in words."""
    if getattr(args, "use_torch_fsdp2", False):
        return "FSDP2"
    return f"Megatron-FSDP, {args.data_parallel_sharding_strategy}"


def is_cut(args: argparse.Namespace) -> bool:
    """Whether each data-parallel rank updates a part of the weights alone."""
    if getattr(args, "use_megatron_fsdp", False):
        return bool(args.data_parallel_sharding_strategy != "no_shard")
    return is_sharded(args) or has_fsdp(args)


def element_bytes(args: argparse.Namespace) -> tuple[int, int]:
    """Bytes of a weight and of a gradient of the model."""
    weight = 2 if args.bf16 or args.fp16 else 4
    if has_fsdp(args):
        dtype = args.megatron_fsdp_main_grads_dtype if args.use_megatron_fsdp else None
        return weight, dtype.itemsize if dtype else weight
    return weight, 4 if args.accumulate_allreduce_grads_in_fp32 else weight
