"""What a rank's memory is counted under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

# Fields of Components, in the order of the tables.
LABELS = {
    "weights": "model weights",
    "gradients": "gradients",
    "main_weights": "main weights",
    "momentum": "momentum",
    "second_moment": "second moment or factors",
    "buffers": "communication and scratch",
}


@dataclass(frozen=True, slots=True)
class Components:
    """Bytes of the tensors that one rank keeps from step to step.

    Attributes:
        weights: parameters of the model, with the padding of the distributed optimizer's buffers.
        gradients: Megatron's gradient buffers, likewise.
        main_weights: fp32 copies of 16-bit weights, or the remainders that take their place.
        momentum: of all optimizers.
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
        return sum(self.as_dict().values()) - self.buffers

    @property
    def total(self) -> int:
        """All of them."""
        return self.static + self.buffers

    def as_dict(self) -> dict[str, int]:
        """Bytes by the keys of :data:`LABELS`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> Self:
        """Undo :meth:`as_dict`; keys beyond those of the fields are left out."""
        return cls(**{key: int(values[key]) for key in LABELS})
