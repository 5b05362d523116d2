"""Megatron's optimizer configuration with CAME's hyperparameters."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import SimpleNamespace
from typing import Any, Self

from megatron.core.optimizer import OptimizerConfig

from megatron_came.core.hyperparameters import TABLE, HyperparameterError, Hyperparameters
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.rules import refuse
from megatron_came.patching import Function
from megatron_came.voice import say_once

# What CAME's flags say beyond its hyperparameters: ``--came-`` and the name.
OWN = ("kernels", "cuda_graph", "momentum_dtype", "main_params", "spike_guard", "rule")
# All of them, as a plain ``OptimizerConfig`` or Megatron's arguments have them.
_PREFIX = "came_"
_SETTINGS = tuple(_PREFIX + name for name in (*(row.name for row in TABLE), *OWN))


def with_came(original: Function, args: Any) -> Any:
    """Let Megatron's reading of the arguments make a configuration of CAME's type."""
    if args.optimizer != "came":
        return original(args)
    # Some releases know no other names than those of their own optimizers.
    standard = copy.copy(args)
    standard.optimizer = "adam"
    config, overrides = original(standard)
    return CameOptimizerConfig.from_plain(config, vars(args)), overrides


def with_settings(original: Function, self: Any, *args: Any, **kwargs: Any) -> None:
    """Let a plain ``OptimizerConfig`` take CAME's settings: hosts pass on what they are given."""
    own = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(_PREFIX)}
    original(self, *args, **kwargs)
    if own and self.optimizer != "came":
        raise UnsupportedError(
            f"{next(iter(own))} is a setting of CAME, but OptimizerConfig has the optimizer "
            f"{self.optimizer}: give it optimizer='came', or leave {', '.join(own)} out."
        )
    for name, value in own.items():
        setattr(self, name, value)


@dataclass
class CameOptimizerConfig(OptimizerConfig):  # type: ignore[misc]
    """An ``OptimizerConfig`` that asks for CAME, by its type.

    Args:
        came: hyperparameters beyond learning rate and weight decay, which stay Megatron's own.
        kernels: as in :class:`megatron_came.CAME`, as are ``cuda_graph`` and ``spike_guard``.
        momentum_dtype: "fp32", "bf16" or "int8".
        main_params: "fp32", or "remainder" for the lower halves alone; see
            :mod:`megatron_came.core.remainders`.
        rule: of each ``--came-rule`` its words, see :mod:`megatron_came.megatron.parameter_rules`.
        seed: of the rounding of momentum.
        why_plain: why all ranks compute in plain PyTorch, where some could do otherwise.

    Attributes:
        as_asked: on the copy of :meth:`as_standard`, the configuration it was made from.
    """

    optimizer: str = "came"
    came: Hyperparameters = field(default_factory=Hyperparameters)
    kernels: str = "auto"
    cuda_graph: bool = False
    momentum_dtype: str = "fp32"
    main_params: str = "fp32"
    spike_guard: float | None = None
    rule: Sequence[Sequence[str]] | None = None
    seed: int = 0
    why_plain: str | None = field(default=None, repr=False)

    @classmethod
    def from_plain(cls, config: Any, args: Mapping[str, Any]) -> Self:
        """Turn an ``OptimizerConfig``, Megatron's own or a host's, into one of this type.

        Args:
            config: its ``came_*`` attributes, named as CAME's flags, are CAME's settings; those of
                a host, whose optimizer it says is "came", are said.
            args: Megatron's arguments, if it has read any: they say what the attributes do not.

        Raises:
            UnsupportedError: an attribute that CAME does not have, or a value that is not allowed.
        """
        given = {k: v for k, v in vars(config).items() if k.startswith(_PREFIX) and v is not None}
        for name in given:
            if name not in _SETTINGS:
                raise UnsupportedError(
                    f"OptimizerConfig has {name}, which is no setting of CAME: these are "
                    f"{', '.join(_SETTINGS)}."
                )
        known = {name: args[name] for name in _SETTINGS if args.get(name) is not None} | given
        own = {name.removeprefix(_PREFIX): value for name, value in known.items()}
        others = {name: own.pop(name) for name in OWN if name in own}
        try:
            came = Hyperparameters(**own)
        except HyperparameterError as error:
            raise UnsupportedError(
                error.said_of(f"OptimizerConfig's {_PREFIX}{error.name}")
            ) from error
        values = {f.name: getattr(config, f.name) for f in fields(OptimizerConfig)}
        values |= {"optimizer": "came", "seed": int(args.get("seed") or 0)}  # Megatron's --seed
        made = cls(**values, came=came, **others)
        if config.optimizer != "came":
            return made
        # What a host has left as it is need not be said.
        usual = {**asdict(Hyperparameters()), **{name: getattr(cls, name) for name in OWN}}
        said = [
            f"{name} {value}"
            for name, value in known.items()
            if value != usual[name.removeprefix(_PREFIX)]
        ]
        say_once(
            f"OptimizerConfig(optimizer='came') trains with {', '.join(said)}, and otherwise with "
            "CAME's defaults."
            if said
            else "OptimizerConfig(optimizer='came') trains with CAME's defaults (megatron-came "
            "flags lists them): it has no came_* attributes."
        )
        return made

    def finalize(self) -> None:
        """Check the settings as they are now: Megatron-Bridge calls this when all are made.

        Raises:
            UnsupportedError: one does not go with CAME.
        """
        self.__post_init__()
        refuse(self.settings)

    def provide(
        self,
        model_chunks: Any,
        config_overrides: Any = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
    ) -> Any:
        """Build the optimizer: Megatron-Bridge's ``setup_optimizer`` calls this, if it is there.

        Arguments are those of Megatron's ``get_megatron_optimizer``; a model may be one chunk.

        Raises:
            UnsupportedError: a model or settings that do not go with CAME.
        """
        from megatron.core import optimizer

        return optimizer.get_megatron_optimizer(
            self,
            model_chunks if isinstance(model_chunks, list) else [model_chunks],
            config_overrides=config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
        )

    @property
    def settings(self) -> SimpleNamespace:
        """All of them under the names of flags, for the rules of what does not go with CAME."""
        own = {_PREFIX + name: getattr(self, name) for name in OWN}
        return SimpleNamespace(**vars(self), **own)

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
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        shown["optimizer"] = "came"
        return f"CameOptimizerConfig({', '.join(f'{k}={v!r}' for k, v in shown.items())})"
