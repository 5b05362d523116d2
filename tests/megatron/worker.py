"""Runs many short Megatron trainings in one set of processes, since starting Megatron takes ten
seconds.

torchrun --nproc-per-node N -m tests.megatron.worker CASES.json RESULTS_FOLDER
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_came.launch import prepare

prepare()  # before anything imports Megatron

from megatron_came import pretrain_gpt  # noqa: E402
from tests.megatron import variants  # noqa: E402


def run_case(case: dict) -> dict:
    """Train as one case says, and return what was seen on this rank."""
    import megatron.training.training as training

    seen: dict = {
        "losses": [],
        "skipped": [],
        "grad_norms": [],
        "zeros": [],
        "params_norms": [],
        "error": None,
    }
    train_step, params_norm = training.train_step, training.calc_params_l2_norm

    def recording_params_norm(*args, **kwargs):
        seen["params_norms"].append(params_norm(*args, **kwargs))
        return seen["params_norms"][-1]

    def recording_train_step(*args, **kwargs):
        result = train_step(*args, **kwargs)
        losses, skipped, grad_norm, zeros = result[0], result[1], result[5], result[6]
        if "lm loss" in losses:
            seen["losses"].append(float(losses["lm loss"]))
        seen["skipped"].append(int(skipped))
        seen["grad_norms"].append(None if grad_norm is None else float(grad_norm))
        seen["zeros"].append(None if zeros is None else float(zeros))
        return result

    sys.argv = ["pretrain_gpt", *case["flags"]]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(training, "train_step", recording_train_step))
        stack.enter_context(
            mock.patch.object(training, "calc_params_l2_norm", recording_params_norm)
        )
        for variant in case["variant"].split("+"):
            variants.apply(variant, stack)
        try:
            pretrain_gpt.main()
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:  # --exit-interval
                return seen
            seen["error"] = f"{type(error).__name__}: {error}"
            if not case["fails"]:
                traceback.print_exc()
    return seen


def forget() -> None:
    """Drop Megatron's global state, so that the next case starts afresh in the same processes."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.training import global_vars

    if dist.is_initialized():
        dist.barrier()
    parallel_state.destroy_model_parallel()
    global_vars.destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()


def main() -> None:
    cases_file, results = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for case in json.loads(cases_file.read_text()):
        print(f"=== case {case['name']}", flush=True)
        seen = run_case(case)
        (results / f"{case['name']}.{rank}.json").write_text(json.dumps(seen))
        if seen["error"] and not case["fails"]:
            sys.exit(1)
        forget()


if __name__ == "__main__":
    main()
