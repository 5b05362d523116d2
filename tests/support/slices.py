"""Slices of tensor-parallel shards on simulated ranks, against the authors' optimizer."""

import torch

from scripts.cases.slices import SETTINGS, train_sharded
from tests.support.oracle import (
    DEVICES,
    distance,
    gradient_history,
    oracle_updates,
    reference_updates,
)

STEPS = 8  # two spikes, and two steps after all rows have waked
MID_ROW = ((0.3, 0.3, 0.71),) * 2  # an empty slice, and bounds within rows


def worst_distance(
    tp, dp, tensors, betas, kind, dtype, kernels, *, seed, steps=STEPS, tp_dp=False, **options
):
    """The largest distance from the authors' class, or with options from the reference."""
    generator = torch.Generator().manual_seed(seed)
    starts = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in tensors
    ]
    histories = [gradient_history(t.shape, steps, kind, dtype, generator) for t in tensors]
    ours = train_sharded(
        tp, dp, tensors, starts, histories, betas, kernels, DEVICES[kernels], tp_dp, **options
    )
    settings = {"betas": betas, **SETTINGS}
    for index, layout in enumerate(tensors):
        if not layout.factored:  # the authors' class updates what has one dimension so
            ours[index], starts[index] = ours[index].view(-1), starts[index].view(-1)
            histories[index] = [gradient.view(-1) for gradient in histories[index]]
    if options:
        histories = [[gradient.double() for gradient in history] for history in histories]
    theirs = [
        (
            reference_updates(start.double(), history, **settings, **options)
            if options
            else oracle_updates(start, history, **settings)
        )[-1]
        for start, history in zip(starts, histories, strict=True)
    ]
    return max(distance(*triple) for triple in zip(ours, theirs, starts, strict=True))
