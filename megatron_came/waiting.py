"""Makes ``import megatron_came`` enough: Megatron's modules are told of CAME once they are there.

Hosts with a training loop of their own (verl, slime, Megatron-Bridge) import this package by its
name, before Megatron or after. So its import must neither import Megatron nor take long: until
Megatron's optimizers are imported, it leaves one entry in ``sys.meta_path``.
"""

from __future__ import annotations

import sys
from threading import get_ident

TYPE_CHECKING = False  # as type checkers know it, without the import of typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_OPTIMIZERS = "megatron.core.optimizer"
_OURS = "megatron_came."
_WATCHED = ("megatron.core.", "megatron.training.", _OURS)


class _Finder:
    """Lets others find modules, and hears when they have been run.

    Attributes:
        arrived: modules that are there and have not been told of CAME.
        knows_optimizers: whether Megatron's optimizers are there; until then nobody is told.
        under_way: how many modules of this package are being imported, one within the other, or
            are telling: what is to be put in place may lie in one of them.
    """

    def __init__(self) -> None:
        self.arrived: set[str] = set()
        self.knows_optimizers = False
        self.under_way = 0
        self._searches: set[tuple[str, int]] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Others may ask all finders too, and so come back to this one.
        search = name, get_ident()
        if not name.startswith(_WATCHED) or search in self._searches:
            return None
        self._searches.add(search)
        try:
            others = (finder for finder in sys.meta_path if finder is not self)
            # As Python does, without those of old packages that lack it.
            finds = filter(None, (getattr(finder, "find_spec", None) for finder in others))
            specs = (find(name, path, target) for find in finds)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._searches.remove(search)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec

    def hear(self, name: str) -> None:
        """Note that a module has been run."""
        if name == _OPTIMIZERS:
            self.knows_optimizers = True
            # What came before is told now; modules that are still being run are heard later.
            self.arrived |= {*filter(_is_complete, list(sys.modules))}
        if self.knows_optimizers:
            self.arrived.add(name)
            self.tell()

    def tell(self) -> None:
        """Put in place what belongs into the modules that have arrived."""
        while self.arrived and not self.under_way:
            names, self.arrived = self.arrived, set()
            self.under_way += 1
            try:
                from megatron_came.megatron.install import install_in

                if not install_in(names):
                    stop()  # it would fail, and say so, with every module
                    self.arrived.clear()
            finally:
                self.under_way -= 1


class _Loader:
    """Another loader, for the length of one import."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        # As if nobody had listened: others ask a module for its loader.
        module.__loader__ = module.__spec__.loader = self._loader
        is_ours = module.__name__.startswith(_OURS)
        _finder.under_way += is_ours
        try:
            self._loader.exec_module(module)
        finally:
            _finder.under_way -= is_ours
        _finder.hear(module.__name__)


_finder = _Finder()


def start() -> None:
    """Wait for Megatron's modules; those that are there already are told now."""
    if _finder not in sys.meta_path:  # the package may be loaded again
        sys.meta_path.insert(0, _finder)
    if _is_complete(_OPTIMIZERS):
        _finder.hear(_OPTIMIZERS)


def stop() -> None:
    """Wait no longer: a launcher puts everything in place, in an order of its own."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _is_complete(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)
