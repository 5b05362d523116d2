"""One rank that puts known numbers into CAME's state on Megatron's buffers, saves and loads them.

No training: a case is a pile of parameters of random shapes, cut into buckets of random sizes. It
is the worker of ``tests.training.harness.run``; see ``test_buckets`` for what a case says.
"""

import contextlib
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_came.launch import prepare

prepare()  # before anything imports Megatron

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

from megatron_came.core.state import FACTORS  # noqa: E402
from megatron_came.megatron.config import CameOptimizerConfig  # noqa: E402
from tests.training.groups import serve  # noqa: E402


class Pile(MegatronModule):
    """Parameters as a case lists them: shape, and of what kind."""

    def __init__(self, config, parameters, dtype):
        super().__init__(config)
        for index, (shape, kind) in enumerate(parameters):
            own = torch.float32 if kind == "fp32" else dtype
            param = torch.nn.Parameter(torch.zeros(shape, dtype=own), kind != "frozen")
            if kind == "shared":
                param.shared_embedding = True  # gets a bucket of its own
            self.register_parameter(f"p{index}", param)


def build(case):
    """Return the wrapped model and CAME on its distributed optimizer."""
    instances = case["instances"]
    parallel_state.initialize_model_parallel(num_distributed_optimizer_instances=instances)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=case["bucket_size"] is not None,
        bucket_size=case["bucket_size"],
        pad_buckets_for_high_nccl_busbw=case["busbw"],
        grad_reduce_in_fp32=case["grad_reduce_in_fp32"],
        num_distributed_optimizer_instances=instances,
    )
    pile = Pile(config, case["parameters"], dtypes[case["precision"]])
    model = DistributedDataParallel(config, settings, pile)
    optimizer = get_megatron_optimizer(
        CameOptimizerConfig(
            lr=1e-3,
            bf16=case["precision"] == "bf16",
            fp16=case["precision"] == "fp16",
            initial_loss_scale=16.0,
            params_dtype=dtypes[case["precision"]],
            use_distributed_optimizer=True,
            momentum_dtype=case["momentum"],
            main_params=case["main_params"],
        ),
        [model],
    )
    return model, optimizer


def truth(name, shape):
    """The main weights and the momentum of a parameter: the latter is exact in int8."""
    numbers = torch.Generator().manual_seed(int(name[1:]))
    return {
        "param": torch.randn(shape, generator=numbers),
        "exp_avg": torch.randint(-127, 128, shape, generator=numbers).float() / 128,
    }


def factor(name, key, like):
    """What a parameter's factor holds."""
    numbers = torch.Generator().manual_seed(1000 * FACTORS.index(key) + int(name[1:]))
    return torch.rand(like.shape, generator=numbers)


def names(model):
    return {param: name.rpartition(".")[2] for name, param in model.named_parameters()}


def parts(optimizer):
    """The optimizers of a chain that hold something."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if not part.is_stub_optimizer]


def fill(model, optimizer):
    """Put the truth into the optimizer's state."""
    known = names(model)
    for part in parts(optimizer):
        for param in part._owned:
            start, stop = part._range_of(param)
            values = truth(known[param], param.shape)
            part._set_main_param_and_optimizer_states(
                param, {key: value.flatten()[start:stop] for key, value in values.items()}
            )
        for param, piece in part._pairs:
            state = part.optimizer.state[piece]
            for key in FACTORS:
                if key in state:
                    state[key].copy_(factor(known[param], key, state[key]))


def wrong(model, optimizer):
    """Name what in the optimizer's state is not the truth."""
    known, problems = names(model), []
    for part in parts(optimizer):
        for param in part._owned:
            start, stop = part._range_of(param)
            state = part._get_main_param_and_optimizer_states(param)
            for key, value in truth(known[param], param.shape).items():
                if not torch.equal(state[key].float(), value.flatten()[start:stop]):
                    problems.append(f"{key} of {known[param]}")
        for param, piece in part._pairs:
            state = part.optimizer.state[piece]
            problems += [
                f"{key} of {known[param]}"
                for key in FACTORS
                if key in state
                and not torch.equal(state[key], factor(known[param], key, state[key]))
            ]
    return problems


def wrong_as_saved(state, model):
    """Name what of a fully reshardable state is not the truth, as its names promise."""
    shapes, problems = {name: param.shape for param, name in names(model).items()}, []
    for entry in nested_values(state["param_state"] or {}):
        if isinstance(entry, ShardedTensor):
            _, _, key, name = entry.key.split(".")
            if not torch.equal(entry.data.float(), truth(name, shapes[name])[key]):
                problems.append(entry.key)
    return problems


def clear(optimizer):
    """Put zeros in the place of all that a checkpoint brings."""
    for part in parts(optimizer):
        for param in part._owned:
            start, stop = part._range_of(param)
            zeros = torch.zeros(stop - start)
            part._set_main_param_and_optimizer_states(param, {"param": zeros, "exp_avg": zeros})
        for _, piece in part._pairs:
            for key in FACTORS:
                if key in part.optimizer.state[piece]:
                    part.optimizer.state[piece][key].zero_()


def sharded_state(style, model, optimizer, *, is_loading):
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable" if style == "dp" else "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": style == "full-efficient",
    }
    weights = model.module.sharded_state_dict(metadata=metadata)
    return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)


def save(style, model, optimizer, folder):
    if style == "legacy":
        if parts(optimizer)[0].distributed_optimizer_instance_id == 0:
            optimizer.save_parameter_state(str(folder / "state.pt"))
        return []
    state = sharded_state(style, model, optimizer, is_loading=False)
    problems = wrong_as_saved(state, model) if style.startswith("full") else []
    dist_checkpointing.save(state, str(folder))
    return problems


def load(style, model, optimizer, folder):
    clear(optimizer)
    if style == "legacy":
        optimizer.load_parameter_state(str(folder / "state.pt"))
        return []
    state = sharded_state(style, model, optimizer, is_loading=True)
    optimizer.load_state_dict(dist_checkpointing.load(state, str(folder)))
    return []


def run_case(case):
    """Save or load; return what was wrong on this rank, and how its buffers were cut."""
    model, optimizer = build(case)
    problems = []
    if case["saves"]:
        fill(model, optimizer)
    for style in case["formats"]:
        folder = Path(case["folder"]) / style
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
        dist.barrier()
        try:
            found = (save if case["saves"] else load)(style, model, optimizer, folder)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            found = [f"{type(error).__name__}: {str(error)[:200]}"]
        problems += [f"{style}: {problem}" for problem in found + wrong(model, optimizer)]
    return {
        "problems": problems,
        "buckets": [
            [(bucket.grad_data.numel(), bucket.numel_unpadded) for bucket in buffer.buckets]
            for buffer in model.buffers
        ],
    }


def main():
    serve(run_case)
