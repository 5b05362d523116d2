"""What the kernels are held against: the plain path in float64, on the same numbers."""

from dataclasses import dataclass

import torch

from megatron_came import CAME, Shard

# Of the total update; with bf16 gradients both read the same rounded numbers.
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Case:
    """Slices of tensors on one rank: (shape, start, stop), whole where start is None."""

    name: str
    tensors: tuple[tuple[tuple[int, ...], int | None, int | None], ...]
    grad_dtype: torch.dtype = torch.float32
    steps: int = 3


def whole(*shapes):
    """Return tensors that one rank holds whole."""
    return tuple((shape, None, None) for shape in shapes)


CASES = [
    Case("matrix", whole((70, 300))),
    Case("vector", whole((70,), (1,), (1030,))),
    Case("long vectors", (((40000,), None, None), ((20000,), 333, 18001)), torch.bfloat16),
    Case("aligned", whole((64, 256), (128, 8))),
    Case("thin", whole((1, 9), (9, 1), (130, 3))),
    Case("tall", whole((2100, 3)), steps=2),
    Case("batches", whole((3, 33, 21), (2, 2, 3, 5))),
    Case("middle of rows", (((40, 90), 301, 2907), ((90,), 13, 77), ((3, 10, 30), 301, 700))),
    Case("aligned middle of rows", (((64, 256), 132, 9000), ((30, 260), 264, 7000))),
    Case("inside one row", (((4, 700), 710, 1390),)),
    Case("empty slices", (((40, 300), 0, 0), ((90,), 90, 90), ((20, 30), None, None))),
    Case("no elements", whole((0, 5), (0,), (3, 4))),
    Case("bf16 gradients", whole((70, 300), (50,)), torch.bfloat16),
    Case("bf16 slices", (((64, 256), 132, 9000), ((40, 90), 301, 2907)), torch.bfloat16),
    Case("long rows", (((9, 1100), None, None), ((11, 1300), 1500, 13900))),
    Case("long bf16 rows", (((9, 1100), None, None), ((11, 1300), 1500, 13900)), torch.bfloat16),
    Case("convolutions", whole((70, 4, 3))),
    Case("nothing", ()),
]


def bad_gradients(kernels, device):
    """Which weights are not finite after a step with a NaN, an infinity or a huge gradient."""
    masks = []
    for bad in (float("nan"), float("inf"), 1e30):
        for shape in ((8,), (6, 5), (2, 4, 5)):
            param = torch.nn.Parameter(torch.ones(shape, device=device))
            grad = torch.ones(shape)
            grad.view(-1)[3] = bad
            grad.view(-1)[-1] = 0.0
            param.grad = grad.to(device)
            CAME([param], lr=1e-2, kernels=kernels).step()
            masks.append(param.detach().isfinite().cpu())
    return masks


def train(case, kernels, device, dtype, seed=0):
    """Train, with two parameter groups; return the total update of every tensor in float64."""
    generator = torch.Generator().manual_seed(seed)
    params, shards = [], {}
    for shape, start, stop in case.tensors:
        numel = torch.Size(shape).numel()
        low, high = (0, numel) if start is None else (start, stop)
        values = torch.randn(numel, generator=generator)[low:high]
        values = values.view(shape) if start is None else values
        param = torch.nn.Parameter(values.to(device, dtype))
        params.append(param)
        shards[param] = Shard(shape, low, high)
    starts = [param.detach().clone() for param in params]
    groups = [
        {"params": params[::2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": params[1::2], "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.95, 0.99)},
    ]
    optimizer = CAME(groups, lr=1e-2, shards=shards, kernels=kernels)
    for step in range(case.steps):
        for param, shard in shards.items():
            rows = torch.rand(shard.local_matrix[1:], generator=generator) + 0.1
            grad = torch.randn(shard.local_matrix, generator=generator) * rows * 10 ** (step % 2)
            grad = grad.reshape(-1)[shard.start : shard.stop].to(case.grad_dtype)
            param.grad_dtype = None  # a gradient may have another dtype than its parameter
            param.grad = grad.to(device, dtype if dtype == torch.float64 else grad.dtype).view(
                param.shape
            )
        optimizer.step()
    return [
        (param.detach().double() - start.double()).cpu()
        for param, start in zip(params, starts, strict=True)
    ]


def worst_distance(case, kernels, device):
    """How far the kernels are from the plain path in float64, of the total update."""
    ours = train(case, kernels, device, torch.float32)
    plain = train(case, "plain", torch.device("cpu"), torch.float64)
    return max(
        (
            ((one - other).norm() / other.norm()).item()
            for one, other in zip(ours, plain, strict=True)
            if other.numel()
        ),
        default=0.0,
    )


def weights_after_moves(kernels, device, moves):
    """Weights after some steps, of which a host has moved all tensors in between if ``moves``."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, 30, generator=generator)
    params = [torch.nn.Parameter(start.to(device, copy=True)) for _ in range(2)]
    optimizer = CAME(params, lr=1e-2, kernels=kernels)
    for step in range(4):
        grad = torch.randn(20, 30, generator=generator).to(device)
        for param in params[: 1 + step % 2]:  # the other takes part in every second step
            param.grad = grad.clone()
        if step % 2 == 0:
            params[1].grad = None
        if moves:
            for param in params:
                param.data = param.data.clone()
                for key, value in optimizer.state[param].items():
                    optimizer.state[param][key] = value.clone()
            optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
    return [param.detach().cpu() for param in params]


def model_weights_after_steps(kernels, device, dtype):
    """16-bit model weights that steps rewrite, first in one place and then in another.

    Returns:
        Pairs of such weights, and what they should be.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (9, 70), (40,), (8, 64)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
    optimizer = CAME(params, lr=1e-2, kernels=kernels)
    pairs = []
    for _ in range(2):
        weights = {p: torch.zeros(p.numel(), dtype=dtype, device=device) for p in params[:2]}
        optimizer.set_model_weights(weights)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
        pairs += [(weight, param.detach().view(-1).to(dtype)) for param, weight in weights.items()]
    return pairs
