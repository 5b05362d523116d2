"""Where a rank's memory goes: predicted from the flags, and measured in the run.

``prediction`` lays a model out as a training run would, without a GPU or other processes;
``report`` measures the run itself (``--came-report-memory``) and prints both side by side.
"""

from __future__ import annotations

from megatron_came.megatron.patching import wrap
from megatron_came.memory import footprint, report

_TRAINING = "megatron.training"
# What of Megatron is replaced: the name, by what makes its stand-in, in which releases, and why.
REPLACEMENTS = (
    (
        f"{_TRAINING}.arguments.add_megatron_arguments",
        report.with_flags,
        "all with a training loop",
        "adds --came-report-memory and --came-memory-dir",
    ),
    (
        f"{_TRAINING}.training.train_step",
        report.with_report,
        "all with a training loop",
        "measures memory after the first step, where --came-report-memory asks for it",
    ),
    (
        f"{_TRAINING}.theoretical_memory_usage.compute_weight_and_optimizer_memory",
        footprint.for_came,
        "all with a training loop",
        "counts what CAME keeps, in place of Adam's two moments, in the logged footprint",
    ),
)


def install() -> None:
    """Correct what Megatron logs of memory, and let it report what it uses. Idempotent."""
    for target, by, _, _ in REPLACEMENTS:
        module, _, name = target.rpartition(".")
        wrap(module, name, by)
