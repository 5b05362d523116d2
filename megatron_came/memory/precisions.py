"""Bytes per element of each optimizer's state."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

SCALE_BYTES = 4  # of the fp32 scale of a block


@dataclass(frozen=True, slots=True)
class Precision:
    """How the elements of a rank's slices are stored.

    Attributes:
        element: bytes of an element.
        block: elements that share a scale; 0 where there is none. A slice's last block may be
            shorter.
    """

    element: int
    block: int = 0


MOMENTUM = {"fp32": Precision(4), "bf16": Precision(2), "int8": Precision(1, block=256)}
# Instead of 16-bit weights' fp32 copies, the 16 bits that they lack.
MAIN_WEIGHTS = {"fp32": Precision(4), "remainder": Precision(2)}

# "factors": r and c of matrices, v of vectors. "confidence": CAME's, which has R and C beside them.
SecondMoment = Literal["full", "factors", "confidence", "none"]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer keeps of each parameter.

    Attributes:
        name: heads its column.
        momentum: None where it has none.
        second_moment: its shape.
        main_weights: of 16-bit weights.
        sums_over_ranks: it has CAME's communication buffers.
        copies_gradients: 16-bit gradients are copied to fp32.
    """

    name: str
    momentum: Precision | None
    second_moment: SecondMoment
    main_weights: Precision = MAIN_WEIGHTS["fp32"]
    sums_over_ranks: bool = False
    copies_gradients: bool = True


def came(args: argparse.Namespace, momentum: str = "fp32", main_weights: str = "fp32") -> Optimizer:
    """CAME with a momentum precision and a form of main weights."""
    remainder = " + rem." if main_weights == "remainder" else ""
    return Optimizer(
        name=f"CAME {momentum}{remainder}",
        momentum=MOMENTUM[momentum],
        second_moment="confidence",
        main_weights=MAIN_WEIGHTS[main_weights],
        sums_over_ranks=True,
        copies_gradients=not (args.bf16 and args.use_distributed_optimizer),
    )


ADAMW = Optimizer("AdamW", momentum=MOMENTUM["fp32"], second_moment="full")
ADAFACTOR = Optimizer("Adafactor", momentum=None, second_moment="factors")


def sgd(args: argparse.Namespace) -> Optimizer:
    """Megatron's SGD, which has momentum unless ``--sgd-momentum 0``."""
    return Optimizer("SGD", MOMENTUM["fp32"] if args.sgd_momentum else None, second_moment="none")


def compared(args: argparse.Namespace) -> list[Optimizer]:
    """The columns of a prediction: CAME in every precision, and the others."""
    modes = [(momentum, "fp32") for momentum in MOMENTUM]
    if args.bf16:
        modes.append(("int8", "remainder"))
    return [*(came(args, *mode) for mode in modes), ADAMW, ADAFACTOR, sgd(args)]


def of_launch(args: argparse.Namespace) -> Optimizer | None:
    """The optimizer that a launch asks for; None for one that is not compared here."""
    if args.optimizer == "came":
        return came(args, args.came_momentum_dtype, args.came_main_params)
    return {"adam": ADAMW, "sgd": sgd(args)}.get(args.optimizer)
