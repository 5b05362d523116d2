"""What a rank's memory is counted under, and what each optimizer keeps of an element."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class Components:
    """Bytes of the tensors that one rank keeps from step to step.

    Attributes:
        weights: parameters of the model, with the padding of the distributed optimizer's buffers.
        gradients: Megatron's gradient buffers, likewise.
        main_weights: fp32 copies of 16-bit weights, or the remainders that replace them.
        momentum: of all optimizers, int8's scales included.
        second_moment: Adam's, or the factors of CAME and Adafactor with the second moments of
            vectors.
        buffers: CAME's sums over ranks, and fp32 copies of 16-bit gradients, which live from an
            optimizer step to the next iteration.
    """

    weights: int
    gradients: int
    main_weights: int
    momentum: int
    second_moment: int
    buffers: int

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
        """All of them."""
        return sum(getattr(self, key) for key in LABELS)


# Bytes of an element of momentum, and of the fp32 scale that a block of int8 elements shares.
MOMENTUM = {"fp32": (4, 0), "bf16": (2, 0), "fp8": (1, 0), "int8": (1, 4), "none": (0, 0)}
# In place of 16-bit weights' fp32 copies CAME may keep the 16 bits that they lack.
MAIN_WEIGHTS = {"fp32": 4, "remainder": 2}


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer keeps of each parameter.

    Attributes:
        name: heads its column.
        momentum: a key of ``MOMENTUM``.
        second_moment: "factors" are r and c of matrices and v of vectors; "confidence" is CAME's,
            which has R and C beside them.
        main_weights: a key of ``MAIN_WEIGHTS``.
        copies_gradients: whether 16-bit gradients are copied to fp32.
        moment: bytes of an element of a full second moment.
    """

    name: str
    momentum: str
    second_moment: Literal["full", "factors", "confidence", "none"]
    main_weights: str = "fp32"
    copies_gradients: bool = True
    moment: int = 4

    def momentum_bytes(self, elements: float, blocks: float) -> float:
        """Bytes of the momentum of so many elements, in so many blocks of int8."""
        element, scale = MOMENTUM[self.momentum]
        return elements * element + blocks * scale

    def main_weights_bytes(self, weight: int) -> int:
        """Bytes of main weights beside a weight of so many bytes."""
        return MAIN_WEIGHTS[self.main_weights] if weight == 2 else 0

    def per_element(self, weight: int, gradient: int) -> dict[str, float]:
        """Bytes of an element by component, where padding and CAME's factors are nothing.

        Args:
            weight: bytes of a weight.
            gradient: bytes of a gradient.
        """
        return {
            "weights": weight,
            "gradients": gradient,
            "main_weights": self.main_weights_bytes(weight),
            "momentum": self.momentum_bytes(1, 1 / BLOCK),
            "second_moment": self.moment if self.second_moment == "full" else 0,
        }


def came(args: argparse.Namespace, momentum: str = "fp32", main_weights: str = "fp32") -> Optimizer:
    """CAME with a precision of momentum and a form of main weights."""
    return Optimizer(
        name=f"CAME {momentum}" + (" + rem." if main_weights == "remainder" else ""),
        momentum=momentum,
        second_moment="confidence",
        main_weights=main_weights,
        copies_gradients=not args.bf16
        or not args.use_distributed_optimizer
        or bool(args.loss_scale),
    )


ADAMW = Optimizer("AdamW", momentum="fp32", second_moment="full")
# Transformer Engine's Adam at its smallest, with --use-precision-aware-optimizer; launches with it
# are not predicted, since its state has not been measured.
PRECISION_AWARE = Optimizer("Adam fp8 + rem.", "fp8", "full", "remainder", False, moment=1)
ADAFACTOR = Optimizer("Adafactor", momentum="none", second_moment="factors")


def sgd(args: argparse.Namespace) -> Optimizer:
    """Megatron's SGD, which has momentum unless ``--sgd-momentum 0``."""
    return Optimizer("SGD", "fp32" if args.sgd_momentum else "none", second_moment="none")


def compared(args: argparse.Namespace) -> list[Optimizer]:
    """The columns of a prediction: CAME in every precision, and the others."""
    modes = [came(args, momentum) for momentum in ("fp32", "bf16", "int8")]
    if args.bf16:
        modes.append(came(args, "int8", "remainder"))
    return [*modes, ADAMW, ADAFACTOR, sgd(args)]


def of_launch(args: argparse.Namespace) -> Optimizer | None:
    """The optimizer that a launch asks for; None for one that is not compared here."""
    if args.optimizer == "came":
        return came(args, args.came_momentum_dtype, args.came_main_params)
    return {"adam": ADAMW, "sgd": sgd(args)}.get(args.optimizer)


def element_bytes(args: argparse.Namespace) -> tuple[int, int]:
    """Bytes of a weight and of a gradient of the model."""
    weight = 2 if args.bf16 or args.fp16 else 4
    return weight, 4 if args.accumulate_allreduce_grads_in_fp32 else weight
