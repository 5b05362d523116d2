"""One rank that steps CAME on weights in fp8, of a stand-in's tensors, and on the same in bf16.

The gradients are made up, so that both runs get the same ones, and no layers are needed. It is the
worker of ``tests.training.harness.run``; see ``test_fp8_weights`` for what a case says.
"""

import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_came.launch import prepare

prepare()  # before anything imports Megatron

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

from megatron_came.core.state import FACTORS  # noqa: E402
from megatron_came.megatron.checkpoints.digests.saving import record_of  # noqa: E402
from megatron_came.megatron.config import CameOptimizerConfig  # noqa: E402
from tests.support import quantized  # noqa: E402
from tests.training.groups import serve  # noqa: E402

STEPS = 3


class Pile(MegatronModule):
    """Parameters as a case lists them: shape, and "fp8", "swiglu" or "expert" (too), or "plain"."""

    def __init__(self, config, parameters, recipe):
        super().__init__(config)
        self.stacked = [f"p{i}" for i, (_, kind) in enumerate(parameters) if kind == "swiglu"]
        for index, (shape, kind) in enumerate(parameters):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(index)).bfloat16()
            is_plain = kind == "plain" or recipe is None
            make = torch.nn.Parameter if is_plain else quantized.parameter
            param = make(*[values] if is_plain else [values, recipe])
            if kind == "expert":
                param.allreduce = False  # has buffers and an optimizer of its own
            self.register_parameter(f"p{index}", param)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in self.stacked:
            state[prefix + name] = apply_swiglu_sharded_factory(state[prefix + name], ())
        return state


def build(case, recipe):
    """Return the wrapped model and CAME on its distributed optimizer; recipe None is bf16."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, bf16=True, params_dtype=torch.bfloat16
    )
    shared = {
        "overlap_param_gather": case["overlaps"] and recipe is not None,
        "reuse_grad_buf_for_mxfp8_param_ag": recipe == "mxfp8",
    }
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        bucket_size=case["bucket_size"],
        grad_reduce_in_fp32=case["fp32_gradients"],
        fp8_param_gather=recipe is not None,
        **shared,
    )
    model = DistributedDataParallel(config, settings, Pile(config, case["parameters"], recipe))
    optimizer = get_megatron_optimizer(
        CameOptimizerConfig(
            lr=1e-2,
            weight_decay=0.1,
            # The norm adds up parameters in the order of buffers.
            clip_grad=1.0 if case["same_cut"] else 0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            momentum_dtype=case["momentum"],
            fp8_recipe=recipe or "delayed",
            spike_guard=case["spike_guard"],
            **shared,
        ),
        [model],
    )
    return model, optimizer


def wrappers_of(optimizer):
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each for each in chain if not each.is_stub_optimizer]


def owner_of(optimizer, param):
    """Which of a chain of optimizers updates a parameter."""
    (owner,) = (w for w in wrappers_of(optimizer) if any(each is param for each, _ in w._pairs))
    return owner


def backward(model, step):
    """Leave a rank's gradients, and Megatron their mean over ranks."""
    rank = dist.get_rank()
    for index, param in enumerate(model.module.parameters()):
        random = torch.Generator().manual_seed(1000 * step + 10 * index + rank)
        param.main_grad.copy_(torch.randn(param.shape, generator=random))
    model.start_grad_sync()
    model.finish_grad_sync()


def take_step(model, optimizer, step):
    """As Megatron's training loop does, up to the end of the next forward pass."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    backward(model, step)
    taken, _, _ = optimizer.step()
    assert taken
    forward(model, optimizer)


def forward(model, optimizer):
    """Let Megatron gather weights, where it does so during the forward pass."""
    if not model.ddp_config.overlap_param_gather:
        return
    model.zero_grad_buffer()
    if model.ddp_config.reuse_grad_buf_for_mxfp8_param_ag:
        for wrapper in wrappers_of(optimizer):
            wrapper._copy_main_params_to_param_buffer()
    model._make_forward_pre_hook()(model.module)


def bytes_of(model):
    """What the model's weights consist of."""
    return [
        each.clone()
        for param in model.module.parameters()
        for each in (
            (param._data, param._scale_inv)
            if isinstance(param, quantized.QuantizedTensor)
            else (param.detach(),)
        )
    ]


def watch_step(model, wrapper, problems):
    """Note whether CAME itself writes any weight of the model."""
    step = wrapper.optimizer.step

    def watched(*args, **kwargs):
        before = bytes_of(model)
        result = step(*args, **kwargs)
        if not all(map(torch.equal, before, bytes_of(model))):
            problems.append("CAME's step has written weights of the model")
        return result

    wrapper.optimizer.step = watched


def state_of(wrapper, param):
    """What the optimizer holds of a parameter on this rank, and its factors."""
    found = wrapper._get_main_param_and_optimizer_states(param) if param in wrapper._owned else {}
    local = next(local for each, local in wrapper._pairs if each is param)
    state = wrapper.optimizer.state[local]
    return {**found, **{key: state[key] for key in FACTORS if key in state}}


def unlike(one, other, *, exact):
    """Name what differs between the states of two models."""
    for (name, param), (_, twin) in zip(
        one[0].module.named_parameters(), other[0].module.named_parameters(), strict=True
    ):
        mine, its = (
            state_of(owner_of(optimizer, p), p)
            for optimizer, p in ((one[1], param), (other[1], twin))
        )
        for key in mine.keys() | its.keys():
            # Of another cut into buffers a rank holds another slice of what is no factor.
            if not exact and key not in FACTORS:
                continue
            is_same = torch.equal if exact else lambda a, b: torch.allclose(a, b, 1e-5, 1e-30)
            if not is_same(mine[key], its[key]):
                yield f"{key} of {name}"


def whole_main(wrapper, param):
    """The main weights of all ranks."""
    whole = torch.zeros(param.shape)
    if param in wrapper._owned:
        start, stop = wrapper._range_of(param)
        tensors = wrapper._get_main_param_and_optimizer_states(param)
        whole.view(-1)[start:stop] = tensors["param"]
    dist.all_reduce(whole, group=wrapper.data_parallel_group)
    return whole


def wrong_weights(model, optimizer, recipe):
    """Name the model's weights that are not their main weights, rounded or quantised."""
    for name, param in model.module.named_parameters():
        main = whole_main(owner_of(optimizer, param), param)
        if not isinstance(param, quantized.QuantizedTensor):
            if not torch.equal(param.detach(), main.bfloat16()):
                yield f"{name} is not its main weights in bf16"
            continue
        wanted = quantized.quantized(main, recipe)
        if not torch.equal(param._data, wanted._data):
            yield f"{name} is not its main weights in fp8"
        if not torch.equal(param._scale_inv, wanted._scale_inv):
            yield f"{name} has other scales than its main weights"
        if recipe != "mxfp8" and not torch.equal(
            param._columns, quantized._matrix(param._data).t().contiguous()
        ):
            yield f"{name} has the transpose of other weights"


def sharded_state(style, model, optimizer, *, is_loading):
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable" if style == "dp" else "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": style == "full-efficient",
    }
    weights = model.module.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        ),
    }


def save(style, pair, folder):
    """Save, and name what the record of digests does not say of the model's weights."""
    model, optimizer = pair
    if style == "legacy":
        optimizer.save_parameter_state(str(folder / "state.pt"))
        return []
    record, _ = record_of(1, [model.module], optimizer, buckets=style == "dp")
    dist_checkpointing.save(sharded_state(style, *pair, is_loading=False), str(folder))
    return [
        f"the digest of the {kind} of {name} is of {saved.dtype}"
        for kind, tensors in record.tensors.items()
        for name, saved in tensors.items()
        if saved.dtype != ("bfloat16" if kind == "weights" else "float32")
    ]


def load(style, pair, folder):
    model, optimizer = pair
    if style == "legacy":
        optimizer.load_parameter_state(str(folder / "state.pt"))
        return
    state = sharded_state(style, *pair, is_loading=True)
    state = dist_checkpointing.load(state, str(folder))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def come_back(case, pair):
    """Save and load in each format, and step on from there."""
    for style in case["formats"]:
        folder = Path(case["folder"]) / case["name"] / style
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        yield from (f"{style}: {each}" for each in save(style, pair, folder))
        other = build(case, case["recipe"])
        load(style, other, folder)
        yield from (f"{style}: {each}" for each in unlike(pair, other, exact=True))
        take_step(*other, STEPS)
        yield from (
            f"{style}, a step later: {each}" for each in wrong_weights(*other, case["recipe"])
        )


def run_case(case):
    """Step both models; return what was wrong on this rank, and how buffers were cut."""
    problems = []
    with quantized.plugged_in():
        parallel_state.initialize_model_parallel()
        ours, plain = build(case, case["recipe"]), build(case, None)
        for wrapper in wrappers_of(ours[1]):
            watch_step(ours[0], wrapper, problems)
        try:
            problems += [f"at first: {each}" for each in unlike(ours, plain, exact=case["exact"])]
            for step in range(STEPS):
                take_step(*ours, step)
                take_step(*plain, step)
                found = [
                    *unlike(ours, plain, exact=case["exact"]),
                    *wrong_weights(*ours, case["recipe"]),
                ]
                problems += [f"step {step}: {each}" for each in found]
            problems += come_back(case, ours)
        except Exception as error:
            traceback.print_exc()
            problems.append(f"{type(error).__name__}: {str(error)[:200]}")
    return {"problems": problems, "buckets": [len(each.buckets) for each in ours[0].buffers]}


def main():
    serve(run_case)
