"""Cases of dtensors_worker: models under every wrapper, trained as people train them."""

import math

import torch
from came_pytorch import CAME as THEIRS
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from megatron_came import CAME
from tests.support.dtensor_models import (
    GPT,
    LIMITS,
    SETTINGS,
    fresh_model,
    loss_of,
    model_distance,
    shard_everything,
    train,
    train_whole,
    wrap,
)


def case_gpt(ranks, dtype=torch.float32):
    whole = train_whole(range(5), dtype)
    for kind in ranks.kinds:
        model = wrap(ranks, kind, dtype)
        train(model, CAME(model.parameters(), **SETTINGS), range(5))
        error = model_distance(model, whole)
        assert error <= LIMITS[dtype], (kind, dtype, error)


def case_gpt_in_float(ranks, *bits):
    assert bits == ("6", "4")
    case_gpt(ranks, torch.float64)


def case_clipped_gradients(ranks):
    def clip(model, step):
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)

    whole = train_whole(range(4), before_step=clip)
    for kind in ("tp_fsdp",):
        model = wrap(ranks, kind)
        train(model, CAME(model.parameters(), **SETTINGS), range(4), clip)
        assert model_distance(model, whole) <= 5e-5, kind


def case_policies(ranks):
    """Weights on the CPU between steps, a model made on the meta device, gradients in bf16."""
    whole = train_whole(range(4))
    offload = wrap(ranks, "fsdp", offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(offload, CAME(offload.parameters(), **SETTINGS), range(4))
    assert model_distance(offload, whole) <= 5e-5
    mixed = wrap(ranks, "fsdp", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    train(mixed, CAME(mixed.parameters(), **SETTINGS), range(4))
    assert 1e-4 < model_distance(mixed, whole) <= 0.5
    for is_early in (False, True):
        with torch.device("meta"):
            model = GPT()
        shard_everything(model, ranks.flat)
        optimizer = CAME(model.parameters(), **SETTINGS) if is_early else None
        model.to_empty(device="cpu")
        for param, value in zip(model.parameters(), fresh_model().parameters(), strict=True):
            sharded = torch.distributed.tensor.distribute_tensor(
                value.detach(), ranks.flat, param.placements
            )
            param.detach().copy_(sharded)
        optimizer = optimizer or CAME(model.parameters(), **SETTINGS)
        train(model, optimizer, range(4))
        assert model_distance(model, whole) <= 5e-5, is_early


def case_swapped_tensors(ranks):
    """Others put new tensors behind the parameters, as loading and offload do."""
    whole = train_whole(range(6))
    model = wrap(ranks, "fsdp")
    optimizer = CAME(model.parameters(), **SETTINGS)
    train(model, optimizer, range(2))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    train(model, optimizer, range(2, 4))
    for param in model.parameters():  # between steps: FSDP2 itself holds on to the old ones
        param._local_tensor = param._local_tensor.detach().clone()
        param.grad = torch.zeros_like(param)
    before = [param.to_local().clone() for param in model.parameters()]
    optimizer.step()
    for param, old in zip(model.parameters(), before, strict=True):
        assert not param.to_local().numel() or not torch.equal(param.to_local(), old)
    assert model_distance(model, whole) < 1


def case_schedules_and_accumulation(ranks):
    def run(model, optimizer):
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        for step in range(6):
            for part in range(2):
                if hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(part == 1)
                (loss_of(model, 2 * step + part) / 2).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return model

    whole, model = fresh_model(), wrap(ranks, "fsdp")
    run(whole, THEIRS(whole.parameters(), **SETTINGS))
    run(model, CAME(model.parameters(), **SETTINGS))
    assert model_distance(model, whole) <= 5e-5


def case_scaled_gradients(ranks):
    """An overflow on one rank, and its copy, is skipped on all."""
    whole = train_whole([0, 1, 3])
    for kind in ("fsdp", "hsdp", "tp_fsdp"):
        model = wrap(ranks, kind)
        optimizer = CAME(model.parameters(), **SETTINGS)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            scaler.scale(loss_of(model, step)).backward()
            grad = next(p.grad for p in model.parameters() if isinstance(p.grad, DTensor))
            if step == 2 and (ranks.rank == 0 or (kind, ranks.rank) == ("hsdp", 2)):
                grad._local_tensor[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["step"] == 3
        assert math.isclose(scaler.get_scale(), 512.0)
        assert model_distance(model, whole) <= 5e-5, kind


def case_optimizers_in_the_backward_pass(ranks):
    whole = train_whole(range(4))
    model = wrap(ranks, "fsdp")
    optimizers = {param: CAME([param], **SETTINGS) for param in model.parameters()}

    def step(param):
        optimizers[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for number in range(4):
        loss_of(model, number).backward()
    assert {optimizer.param_groups[0]["step"] for optimizer in optimizers.values()} == {4}
    assert model_distance(model, whole) <= 5e-5
