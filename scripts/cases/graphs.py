"""Steps that are replayed as CUDA graphs, held against the same steps launched from Python."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from megatron_came import CAME
from megatron_came.kernels.triton import graphs
from megatron_came.kernels.triton.device import Device

# Rows of whole vector loads and not, and vectors.
SHAPES = ((8, 256), (9, 7), (256,), (7,))
# One step from Python, one replayed; a change; after it at most two from Python.
WARM_UP, CHANGED, STEPS = 1, 2, 5


@contextmanager
def counted():
    """Count captures and replays."""
    counts, captured = Counter(), Device.captured

    def counting(device, launch):
        counts["captures"] += 1
        graph = captured(device, launch)
        return SimpleNamespace(replay=lambda: (counts.update(["replays"]), graph.replay()))

    with (
        mock.patch.object(Device, "captured", counting),
        mock.patch.object(graphs, "WARM_UP", WARM_UP),
    ):
        yield counts


def moved(optimizer, params, kept):
    """A gradient and weights lie elsewhere, and where they were is something else."""
    kept += [params[0].grad, params[1].data]
    params[0].grad, params[1].data = params[0].grad.clone(), params[1].data.clone()
    for old in kept:
        old.fill_(1e9)


def missing(optimizer, params, kept):
    """A gradient."""
    params[0].grad = None


def other_dtype(optimizer, params, kept):
    """At the same address."""
    bf16 = params[0].grad.view(-1).view(torch.bfloat16)[: params[0].numel()].view_as(params[0])
    params[0].decoupled_grad = bf16


def loaded(optimizer, params, kept):
    """Other momentum, after more steps."""
    state = optimizer.state_dict()
    for own in state["state"].values():
        own["exp_avg"] = -own["exp_avg"]
    for group in state["param_groups"]:
        group["step"] += 40
    optimizer.load_state_dict(state)


def more(optimizer, params, kept):
    """Parameters, in a group of their own."""
    params.append(torch.nn.Parameter(torch.ones_like(params[1])))
    params[-1].grad = torch.ones_like(params[-1])
    optimizer.add_param_group({"params": params[-1:], "lr": 3e-2})


def other_settings(optimizer, params, kept):
    """Decays and the like, and the number of steps."""
    optimizer.param_groups[0] |= {"betas": (0.5, 0.9, 0.99), "eps": (1e-3, 1e-3), "step": 90}
    optimizer.param_groups[1]["clip_threshold"] = 0.1


def other_weights(optimizer, params, kept):
    """The model's 16-bit copies, others than before."""
    kept.append(torch.zeros(params[2].shape, dtype=torch.float16, device=params[2].device))
    optimizer.set_model_weights({params[2]: kept[-1]})


CHANGES = (moved, missing, other_dtype, loaded, more, other_settings, other_weights)


def trained(device, momentum, *, change=None, **more):
    """Weights, copies and state after steps with other rates, decays and gradients each.

    Args:
        device: of the parameters.
        momentum: dtype.
        change: of :data:`CHANGES`, before step ``CHANGED``.
        more: settings of CAME.
    """
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]
    groups = [{"params": params[::2], "betas": (0.8, 0.95, 0.99)}, {"params": params[1::2]}]
    optimizer = CAME(groups, lr=1e-2, kernels="triton", momentum_dtype=momentum, **more)
    copies = {params[0]: torch.zeros(SHAPES[0], dtype=torch.bfloat16, device=device)}
    optimizer.set_model_weights(copies)
    for param in params:
        param.grad = torch.zeros_like(param)
    kept = []
    for step in range(STEPS):
        if step == CHANGED and change is not None:
            change(optimizer, params, kept)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"], group["weight_decay"] = 1e-2 / (1 + step + number), 0.1 * step
        for param in params:
            value = torch.randn(param.shape, generator=generator)
            grad = getattr(param, "decoupled_grad", param.grad)
            if grad is not None:
                grad.copy_(value)
        optimizer.step()
    states = [value.float() for param in params for value in optimizer.state[param].values()]
    steps = torch.tensor([group["step"] for group in optimizer.param_groups])
    weights = [param.detach() for param in params]
    return [each.cpu() for each in (*weights, *copies.values(), *kept, *states, steps)]
