"""One rank of many short Megatron trainings, one after the other: see ``nursery``, which imports
this once for all ranks, and ``harness``.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # as below, what every rank would import in a second of its own
import torch.distributed as dist

from megatron_came.launch import prepare

prepare()  # before anything imports Megatron

from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset  # noqa: E402

from megatron_came import pretrain_gpt  # noqa: E402
from megatron_came.voice import say_once  # noqa: E402
from tests.support import loaded_kernels  # noqa: E402
from tests.training import variants  # noqa: E402
from tests.training.groups import connect, meet  # noqa: E402
from tests.training.recording import Recorder  # noqa: E402


def run_case(case: dict) -> dict:
    """Train as one case says, and return what was seen on this rank."""
    flags = {"--fp16", "--came-spike-guard"}.intersection(case["flags"])
    recorder = Recorder(watches=case["fails"] or bool(flags))
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    sys.argv = ["pretrain_gpt", *case["flags"], *(case["last"] if is_last else [])]
    with contextlib.ExitStack() as stack:
        recorder.install(stack)
        for variant in case["variant"].split("+"):
            variants.apply(variant, stack)
        try:
            pretrain_gpt.main()
        except (Exception, SystemExit) as error:
            # --exit-interval ends with SystemExit(0).
            if not isinstance(error, SystemExit) or error.code:
                recorder.seen["error"] = f"{type(error).__name__}: {error}"
                if not case["fails"]:
                    traceback.print_exc()
    return recorder.finish()


def forget() -> None:
    """Drop Megatron's global state, so that the next case starts afresh in the same processes."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.training import global_vars

    dist.barrier()
    parallel_state.destroy_model_parallel()
    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    say_once.cache_clear()
    dist.destroy_process_group()  # their threads would slow down all later cases
    gc.collect()


def read_help_once() -> None:
    """Keep the help texts of flags, which Megatron reads from its source three times a case."""
    from megatron.training import argument_utils, arguments

    factory = getattr(argument_utils, "ArgumentGroupFactory", None)
    if factory is None:  # before 0.18
        return
    read, reader = factory._get_field_docstrings, factory.__new__(factory)
    texts = functools.cache(lambda kind: read(reader, kind))
    factory._get_field_docstrings = lambda self, kind: texts(kind)
    arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def leave_out() -> None:
    """Do not print a thousand arguments, nor parse them twice for what no case asks for."""
    from megatron.training import arguments, ft_integration, inprocess_restart

    arguments._print_args = lambda title, args: None
    inprocess_restart.maybe_wrap_for_inprocess_restart = lambda pretrain: (pretrain, None)
    ft_integration.setup = lambda *args: None


for name in (  # what the first case would import in each rank
    "megatron.core.datasets.helpers",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.libraries",
    "megatron.core.tokenizers.text.models",
    "torch.utils.serialization.config",
):
    with contextlib.suppress(ImportError):  # of another release
        importlib.import_module(name)
read_help_once()
leave_out()
loaded_kernels.load()
MockGPTLowLevelDataset.size = 1000  # documents, of 100,000 whose order every case would draw anew


def main() -> None:
    cases_file, results = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = meet()
    for case in json.loads(cases_file.read_text()):
        print(f"=== case {case['name']}", flush=True)
        connect(case["name"], store)
        seen = run_case(case)
        (results / f"{case['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))
        if seen["error"] and not case["fails"]:
            sys.exit(1)
        forget()
