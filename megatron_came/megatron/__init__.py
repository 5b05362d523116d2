"""The adapter to Megatron: what makes ``--optimizer came`` work in an unmodified Megatron.

:func:`install` is all that a launcher calls. Everything that knows
Megatron's names is in this package; the optimizer itself does not.
"""

from megatron_came.megatron.install import install

__all__ = ["install"]
