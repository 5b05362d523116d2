"""Where a rank's memory goes: predicted from the flags, and measured in the run.

``prediction`` lays a model out as a training run would, without a GPU or other processes;
``report`` measures the run itself (``--came-report-memory``) and prints both side by side.
"""

from __future__ import annotations

from megatron_came.memory import footprint, report


def install() -> None:
    """Correct what Megatron logs of memory, and let it report what it uses."""
    footprint.install()
    report.install()
