"""Where a rank's memory goes: predicted from the flags, and measured in the run.

``prediction`` lays a model out as a training run would, without a GPU or other processes;
``report`` measures the run itself (``--came-report-memory``) and prints both side by side.
"""

from __future__ import annotations

from megatron_came.patching import Replacement, put_in_place

# Every name of Megatron's that is replaced for memory.
REPLACEMENTS = (
    Replacement(
        "megatron.training.theoretical_memory_usage:compute_weight_and_optimizer_memory",
        "megatron_came.memory.footprint:for_came",
        "what Megatron logs at the first iteration knows CAME",
    ),
    Replacement(
        "megatron.training.arguments:add_megatron_arguments",
        "megatron_came.memory.report:with_flags",
        "Megatron has the flags of the report",
    ),
    Replacement(
        "megatron.training.training:train_step",
        "megatron_came.memory.report:with_report",
        "memory is measured around the first optimizer step, where --came-report-memory asks",
    ),
)


def install() -> None:
    """Correct what Megatron logs of memory, and let it report what it uses.

    Raises:
        MegatronError: as :func:`megatron_came.megatron.install`.
    """
    put_in_place(REPLACEMENTS)
