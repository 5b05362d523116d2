"""The memory of ranks that train with FSDP, against what is predicted from the flags alone."""

import json
from dataclasses import asdict

import pytest
import torch

from megatron_came import megatron, memory
from megatron_came.memory import megatron_flags
from megatron_came.memory.optimizers import of_launch
from megatron_came.memory.prediction import Launch
from tests.training.harness import SMALL, Case, run

# An odd number of rows, which FSDP2 pads.
MODEL = (
    SMALL.replace("--vocab-size 127", "--vocab-size 126 --make-vocab-size-divisible-by 1")
    + "--train-iters 1 --lr-warmup-iters 0 --untie-embeddings-and-output-weights "
    "--no-gradient-accumulation-fusion "
)
FSDP2 = "--use-torch-fsdp2 --ckpt-format torch_dist "
FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy "
ADAM, BF16 = "--optimizer adam ", "--bf16 "
CASES = {
    "fsdp2": FSDP2,
    "fsdp2-adam": FSDP2 + ADAM,
    "fsdp2-bf16": FSDP2 + BF16,
    "fsdp2-bf16-adam": FSDP2 + BF16 + ADAM,
    "fsdp2-int8": FSDP2 + BF16 + "--came-momentum-dtype int8 ",
    **{each: f"{FSDP}{each} " for each in ("no_shard", "optim", "optim_grads")},
    "optim_grads_params": FSDP + "optim_grads_params ",
    "optim_grads_params-bf16": FSDP + "optim_grads_params " + BF16,
    "optim-bf16-adam": FSDP + "optim " + BF16 + ADAM,
    "optim_grads-fp32-gradients": FSDP
    + "optim_grads --megatron-fsdp-main-grads-dtype fp32 "
    + BF16,
    "no_shard-adam": FSDP + "no_shard " + ADAM,
}
if torch.__version__.startswith("2.6."):  # its fully_shard does not run on a CPU
    CASES = {name: flags for name, flags in CASES.items() if FSDP2 not in flags}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Bytes of each rank's tensors, by name of the case."""
    folder = tmp_path_factory.mktemp("fsdp-memory")
    cases = [
        Case(name, f"{flags}--came-memory-dir {folder / name}", "fsdp-memory", model=MODEL)
        for name, flags in CASES.items()
    ]
    run(2, cases, folder / "seen")
    return {
        name: [json.loads((folder / name / f"{rank}.json").read_text()) for rank in range(2)]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_measured_memory_is_what_was_predicted(measured, name):
    megatron.install()
    memory.install()
    launch = Launch(megatron_flags.parse(f"{MODEL} --micro-batch-size 2 {CASES[name]}".split(), 2))
    optimizer = of_launch(launch.args)
    for rank, sizes in enumerate(measured[name]):
        shard = rank if launch.grid.sharded else 0
        predicted = asdict(launch.rank(0, (shard, shard)).components(optimizer))
        assert sizes == predicted
