"""What a training run gives the kernels, held against the plain path: no pytest, any device."""

from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist

from megatron_came import CAME, Shard
from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.remainders import join
from megatron_came.core.saved import saved_momentum
from scripts.cases.kernels import TOLERANCE

BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8
# Of elements that are rounded, how many may be rounded otherwise.
FEW = 0.005
# Rows of whole vector loads, and of blocks of int8; then what is neither.
ALIGNED = ((64, 256), (24, 512), (256,))
UNALIGNED = ((50, 70), (2, 33, 21), (77,))


@dataclass(frozen=True)
class Setting:
    """How a run keeps things.

    Attributes:
        grad: dtype of gradients.
        momentum: dtype of the momentum.
        weights: "fp32"; "model" with a 16-bit copy that the step writes; "remainder".
    """

    grad: torch.dtype
    momentum: torch.dtype
    weights: str

    @property
    def name(self):
        """In words."""
        grad, momentum = (str(dtype).removeprefix("torch.") for dtype in (self.grad, self.momentum))
        return f"{grad} gradients, {momentum} momentum, {self.weights} weights"


SETTINGS = [
    Setting(grad, momentum, weights)
    for grad in (FP32, BF16)
    for momentum in (FP32, BF16, INT8)
    for weights in ("fp32", "model", "remainder")
]


def optimizer_of(params, setting, kernels, **more):
    """Make an optimizer over fp32 tensors, or the upper halves of theirs.

    Returns:
        The parameters, the optimizer, and the model's copies.
    """
    is_split = setting.weights == "remainder"
    own = [torch.nn.Parameter(param.to(BF16) if is_split else param.clone()) for param in params]
    settings = {"momentum_dtype": setting.momentum, "remainders": is_split, "weight_decay": 0.1}
    optimizer = CAME(own, lr=1e-2, kernels=kernels, **settings, **more)
    copies = [param.detach().to(BF16) for param in own] if setting.weights == "model" else []
    optimizer.set_model_weights(dict(zip(own, copies, strict=True)) if copies else {})
    return own, optimizer, copies


def give(params, grads, dtype):
    """Give parameters their gradients, of another dtype perhaps."""
    for param, grad in zip(params, grads, strict=True):
        param.decoupled_grad = grad.to(param.device, dtype)


def problem(setting, shapes, kernels, device):
    """Say how the kernels differ from the plain path on a CPU after three steps, or None.

    The rate changes from step to step. What is rounded differs where last bits do: in few elements,
    of which int8 has the largest steps.
    """
    results = [_train(setting, shapes, *path) for path in ((kernels, device), ("plain", "cpu"))]
    (ours, momentum, copies), (plain, plain_momentum, plain_copies) = results
    is_rounded = setting.momentum != FP32
    distance = ((ours - plain).norm() / plain.norm()).item()
    if distance > (10 if is_rounded else 1) * TOLERANCE:
        return f"the weights are {distance:.1e} of the update away"
    unlike = (momentum != plain_momentum).double().mean().item()
    if is_rounded and unlike > FEW:
        return f"{unlike:.2%} of the momentum differs"
    unlike = (copies != plain_copies).double().mean().item() if copies.numel() else 0.0
    return f"{unlike:.2%} of the model's weights differ" if unlike > FEW else None


def _train(setting, shapes, kernels, device):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    params, optimizer, copies = optimizer_of(
        [start.to(device) for start in starts], setting, kernels
    )
    before = [main(optimizer, param).cpu().clone() for param in params]
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        give(params, [torch.randn(shape, generator=generator) for shape in shapes], setting.grad)
        optimizer.step()
    moved = [
        main(optimizer, param).cpu() - start for param, start in zip(params, before, strict=True)
    ]
    kept = [saved_momentum(optimizer.state[param]).cpu() for param in params]
    return flat(moved), flat(kept), flat(copies)


def main(optimizer, param):
    """A parameter's main weights, in fp32."""
    state = optimizer.state[param]
    return join(param.detach(), state["remainder"]) if "remainder" in state else param.detach()


def flat(tensors):
    """All elements of tensors, on a CPU."""
    return torch.cat([torch.empty(0), *(each.cpu().view(-1).float() for each in tensors)])


def reduced_alone(kernels, device, backend, store, shapes=(*ALIGNED, *UNALIGNED), **more):
    """Weights after steps without process groups, and with one of this rank alone, reduced anyway.

    Args:
        kernels: who computes.
        device: on which.
        backend: of ``torch.distributed``.
        store: likewise.
        shapes: of the parameters.
        more: settings of CAME.
    """
    results = []
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        for group in (None, dist.group.WORLD):
            generator = torch.Generator().manual_seed(0)
            params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
            shards = {
                param: Shard.whole(shape)
                if group is None
                else Shard(shape, 0, param.numel(), dp_group=group, copies_group=group)
                for param, shape in zip(params, shapes, strict=True)
            }
            optimizer = CAME(params, lr=1e-2, shards=shards, kernels=kernels, **more)
            for param in params:
                param.grad = torch.zeros_like(param)
            # A group of one is left out otherwise.
            with (
                mock.patch("megatron_came.core.sums._several", lambda group: group),
                mock.patch.object(ParameterSlice, "is_shared", group is not None),
            ):
                for _ in range(6):
                    for param in params:
                        param.grad.copy_(torch.randn(param.shape, generator=generator))
                    optimizer.step()
            results.append(flat([param.detach() for param in params]))
    finally:
        dist.destroy_process_group()
    return results
