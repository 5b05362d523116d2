"""Megatron's optimizer configuration with CAME's hyperparameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, Self

from megatron.core.optimizer import OptimizerConfig

from megatron_came.core.hyperparameters import Hyperparameters
from megatron_came.megatron.arguments import hyperparameters
from megatron_came.patching import Function

# What CAME's flags say beyond its hyperparameters: ``--came-`` and the name.
OWN = ("kernels", "momentum_dtype", "main_params")


def with_came(original: Function) -> Function:
    """Let Megatron's reading of the arguments make a configuration of CAME's type."""

    def get_megatron_optimizer_config(args: Any) -> Any:
        if args.optimizer != "came":
            return original(args)
        # Some releases know no other names than those of their own optimizers.
        standard = copy.copy(args)
        standard.optimizer = "adam"
        config, overrides = original(standard)
        return CameOptimizerConfig.from_megatron(config, args), overrides

    return get_megatron_optimizer_config


@dataclass
class CameOptimizerConfig(OptimizerConfig):  # type: ignore[misc]
    """An ``OptimizerConfig`` that asks for CAME, by its type.

    Args:
        came: hyperparameters beyond learning rate and weight decay, which stay Megatron's own.
        kernels: as in :class:`megatron_came.CAME`.
        momentum_dtype: "fp32", "bf16" or "int8".
        main_params: "fp32", or "remainder" for the lower halves alone; see
            :mod:`megatron_came.core.remainders`.
        seed: of the rounding of momentum.
        why_plain: why all ranks compute in plain PyTorch, where some could do otherwise.

    Attributes:
        as_asked: on the copy of :meth:`as_standard`, the configuration it was made from.
    """

    optimizer: str = "came"
    came: Hyperparameters = field(default_factory=Hyperparameters)
    kernels: str = "auto"
    momentum_dtype: str = "fp32"
    main_params: str = "fp32"
    seed: int = 0
    why_plain: str | None = field(default=None, repr=False)

    @classmethod
    def from_megatron(cls, config: Any, args: Any) -> Self:
        """Turn Megatron's own configuration, made from its arguments, into one of this type."""
        values = {f.name: getattr(config, f.name) for f in fields(OptimizerConfig)}
        return cls(
            **{**values, "optimizer": "came"},
            came=hyperparameters(args),
            **{name: getattr(args, f"came_{name}") for name in OWN},
            seed=args.seed,
        )

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
        values = ((f.name, getattr(self, f.name)) for f in fields(self) if f.repr)
        return "CameOptimizerConfig({})".format(
            ", ".join(
                f"{name}={'came' if name == 'optimizer' else value!r}" for name, value in values
            )
        )
