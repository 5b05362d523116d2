"""Cases of dtensors_worker: figures of a step, and the guard that skips spikes."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_came import CAME
from megatron_came.core.spike_guard import LEAST
from megatron_came.voice import of_all_ranks
from tests.support.dtensor_models import SETTINGS, fresh_model, loss_of, model_distance, wrap

# Adam-like betas: with the default ones the largest spike is 32 times the usual update.
BETAS = {"betas": (0.9, 0.99, 0.999)}
FEW = 6  # steps that a guard waits for, instead of LEAST


def figures_of(model, momentum_dtype=torch.float32):
    """Figures after each of three steps."""
    optimizer = CAME(model.named_parameters(), momentum_dtype=momentum_dtype, **SETTINGS)
    found = []
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        found.append(optimizer.diagnostics())
        optimizer.zero_grad()
    return found


def case_figures_are_those_of_one_rank(ranks):
    for dtype, rel in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        whole = figures_of(fresh_model(), dtype)
        assert whole[0].keys() == {"all", "embedding", "norm", "other"}
        for kind in ranks.own_kinds:
            ours = figures_of(wrap(ranks, kind), dtype)
            assert of_all_ranks(ours) == [ours] * ranks.size, kind
            for one, other in zip(ours, whole, strict=True):
                assert one.keys() == other.keys(), kind
                for layers, values in other.items():
                    assert one[layers] == pytest.approx(values, rel=rel), (kind, layers, dtype)


def spiky(model):
    """Train with a guard through a spike; returns when steps were skipped."""
    optimizer = CAME(model.parameters(), spike_guard=1.5, **BETAS, **SETTINGS)
    skipped = []
    for step in range(FEW + 4):
        before = optimizer.spike_guard.skipped
        (loss_of(model, step) * (1e3 if step == FEW + 2 else 1.0)).backward()
        optimizer.step()
        skipped.append(optimizer.spike_guard.skipped > before)
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["step"] == FEW + 3
    return skipped


@mock.patch("megatron_came.core.spike_guard.LEAST", FEW)
def case_a_spike_is_skipped_on_all_ranks(ranks):
    whole = fresh_model()
    expected = [step == FEW + 2 for step in range(FEW + 4)]
    assert spiky(whole) == expected
    for kind in ranks.own_kinds:
        model = wrap(ranks, kind)
        assert of_all_ranks(spiky(model)) == [expected] * ranks.size, kind
        assert model_distance(model, whole) <= 5e-5, kind


def case_a_spike_that_some_ranks_see(ranks):
    """A plain parameter beside a DTensor has a gradient of its own on each rank."""
    cut = nn.Parameter(distribute_tensor(torch.ones(8, 6), ranks.flat, (Shard(0),)))
    plain = nn.Parameter(torch.ones(20, 30))
    optimizer = CAME([cut, plain], spike_guard=2.0, **BETAS, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for step in range(LEAST + 5):
        gradient = torch.randn(8, 6, generator=generator)
        cut.grad = distribute_tensor(gradient, ranks.flat, (Shard(0),))
        plain.grad = torch.randn(20, 30, generator=generator)
        if ranks.rank == ranks.size - 1 and step > LEAST:
            plain.grad *= {LEAST + 1: 1e3, LEAST + 2: torch.nan}.get(step, 1.0)
        optimizer.step()
    assert of_all_ranks(optimizer.spike_guard.skipped) == [2] * ranks.size
