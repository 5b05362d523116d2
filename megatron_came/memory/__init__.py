"""Where a rank's memory goes: predicted from the flags, and measured in the run.

``prediction`` lays a model out as a training run would, without a GPU or other processes;
``report`` measures the run itself (``--came-report-memory``) and prints both side by side.
"""

from megatron_came.patching import put_in_place, table
from megatron_came.versions import release

# Every name of Megatron's that is replaced for memory.
# fmt: off
REPLACEMENTS = table("megatron_came.memory", {
    "megatron.training.theoretical_memory_usage": (
        ("compute_weight_and_optimizer_memory", "footprint:for_came", "it knows Adam alone"),
    ),
    "megatron.training.arguments": (
        ("add_megatron_arguments", "report:with_flags", "the report has its flags"),
    ),
    "megatron.training.training": (
        ("train_step", "report:with_report", "memory is measured around the first step"),
    ),
})
# fmt: on


def install() -> None:
    """Correct what Megatron logs of memory, and let it report what it uses.

    Raises:
        MegatronError: as :func:`megatron_came.megatron.install`.
    """
    put_in_place(REPLACEMENTS)


def check_release() -> None:
    """Look whether the installed Megatron is one whose models can be laid out.

    Raises:
        UnsupportedError: it is not.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_came.megatron.errors import UnsupportedError

    installed = release()
    # What lays buffers out is a function of its own since then.
    if installed < (0, 19) or not hasattr(DistributedOptimizer, "compute_full_param_layout"):
        raise UnsupportedError(
            "memory is predicted with Megatron 0.19 or newer, and here is {}.{}: use "
            "megatron-core 0.19.2 for it.".format(*installed)
        )
