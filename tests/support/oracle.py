"""The yardstick: the authors' optimizer on whole tensors, and how far from it a result may be."""

import came_pytorch
import pytest
import torch

from megatron_came.core.reference import update

# Of the total update: ||p - oracle|| / ||oracle - p0||. The orders of summation differ, hence
# not zero.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}

# Under Triton's interpreter long tests take minutes: make test-triton.
INTERPRETED = () if torch.cuda.is_available() else pytest.mark.interpreted
DEVICES = {
    "plain": torch.device("cpu"),
    "numba": torch.device("cpu"),
    "triton": torch.device("cuda" if torch.cuda.is_available() else "cpu"),
}

# Who computes a step, and in what: the same tests run against every path.
KERNELS = ["plain", "numba", pytest.param("triton", marks=INTERPRETED)]
PATHS = [
    (torch.float64, "plain"),
    (torch.float32, "plain"),
    (torch.float32, "numba"),
    pytest.param(torch.float32, "triton", marks=INTERPRETED),
]
COMPILED = ("numba", "triton")
ON_REAL_DEVICES = [
    "plain",
    "numba",
    pytest.param("triton", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")),
]
on_both = pytest.mark.parametrize("kernels", COMPILED)
on_every_path = pytest.mark.parametrize(("dtype", "kernels"), PATHS, ids=str)
with_all_kernels = pytest.mark.parametrize("kernels", KERNELS)

BETAS = [(0.9, 0.999, 0.9999), (0.9, 0.95, 0.995)]


def oracle_updates(start, gradients, **settings):
    """Run the authors' class; return the parameter after every step.

    Args:
        start: initial value.
        gradients: one a step; None for a step without gradient.
        settings: for ``came_pytorch.CAME``.
    """
    param = torch.nn.Parameter(start.clone())
    optimizer = came_pytorch.CAME([param], **settings)
    history = []
    for gradient in gradients:
        param.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        history.append(param.detach().clone())
    return history


def reference_updates(start, gradients, *, betas, lr, weight_decay, clip_threshold=1.0, **options):
    """Run ``core/reference.py``, whose options the authors' class has not; as above."""
    theta, state, history = start.clone(), {}, []
    letters = dict(zip(("b1", "b2", "b3"), betas, strict=True)) | options
    letters |= {"eta": lr, "weight_decay": weight_decay, "d": clip_threshold}
    for gradient in gradients:
        update(theta, gradient, state, eps1=1e-30, eps2=1e-16, **letters)
        history.append(theta.clone())
    return history


def distance(ours, theirs, start):
    """||ours - theirs|| / ||theirs - start||, in float64."""
    ours, theirs, start = ours.double(), theirs.double(), start.double()
    if not torch.isfinite(ours).all():
        return float("inf")
    moved = (theirs - start).norm().item()
    return (ours - theirs).norm().item() / moved if moved else (ours - theirs).norm().item()


def gradient_history(shape, steps, kind, dtype, generator):
    """Full-rank gradients with unlike rows and columns.

    Args:
        shape: of the tensor.
        steps: how many.
        kind: normal; spikes (some steps 1000 times larger); wakes (zero, then alive, some rows
            later still); tiny (1e-20); huge (1e18).
        dtype: of the gradients.
        generator: source of randomness.
    """
    rows = torch.rand(shape[:1], generator=generator).add_(0.05) if shape else torch.ones(())
    rows = rows.view(-1, *[1] * (len(shape) - 1)) if shape else rows
    columns = (
        torch.rand(shape[-1:], generator=generator).add_(0.05) if len(shape) > 1 else torch.ones(())
    )
    scale = {"tiny": 1e-20, "huge": 1e18}.get(kind, 1.0)
    history = []
    for step in range(steps):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        gradient = gradient * rows.double() * columns.double() * scale
        if kind == "spikes" and step % 4 == 2:
            gradient *= 1000
        if kind == "wakes":
            gradient *= step >= 3
            if shape:
                gradient[: shape[0] // 2] *= step >= 6
        history.append(gradient.to(dtype))
    return history


KINDS = ["normal", "spikes", "wakes", "tiny", "huge"]
