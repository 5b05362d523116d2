"""Megatron's optimizer configuration with CAME's hyperparameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, Self

from megatron.core.optimizer import OptimizerConfig

from megatron_came.maths.hyperparameters import Hyperparameters


@dataclass
class CameOptimizerConfig(OptimizerConfig):  # type: ignore[misc]
    """An ``OptimizerConfig`` that asks for CAME, by its type.

    Args:
        came: hyperparameters beyond learning rate and weight decay, which stay Megatron's own.
        kernels: as in :class:`megatron_came.CAME`.

    Attributes:
        as_asked: on the copy of :meth:`as_standard`, the configuration it was made from.
    """

    optimizer: str = "came"
    came: Hyperparameters = field(default_factory=Hyperparameters)
    kernels: str = "auto"

    @classmethod
    def from_megatron(cls, config: Any, came: Hyperparameters, kernels: str = "auto") -> Self:
        """Turn Megatron's own configuration into one of this type."""
        values = {f.name: getattr(config, f.name) for f in fields(OptimizerConfig)}
        return cls(**values, came=came, kernels=kernels)

    def as_standard(self) -> Self:
        """Return a copy that Megatron's builder takes the standard path with.

        The builder sends every name but adam and sgd to its layer-wise optimizers. The copy
        carries the name adam; CAME is recognised by the type, and the optimizers that are built
        get the original.
        """
        standard = copy.copy(self)
        standard.optimizer = "adam"
        standard.as_asked = self
        return standard

    def __repr__(self) -> str:
        """As ``OptimizerConfig``, which Megatron logs, with the name that was asked for."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return "CameOptimizerConfig({})".format(
            ", ".join(
                f"{name}={'came' if name == 'optimizer' else value!r}" for name, value in values
            )
        )
