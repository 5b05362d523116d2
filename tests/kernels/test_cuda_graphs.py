"""Launches that are replayed: the same bits as launches from Python, and never what has changed."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_came import CAME
from megatron_came.kernels.triton.device import Device
from scripts.cases.graphs import (
    CHANGED,
    CHANGES,
    SHAPES,
    STEPS,
    WARM_UP,
    counted,
    missing,
    moved,
    other_dtype,
    other_settings,
    trained,
)
from scripts.cases.production import reduced_alone
from scripts.cases.slices import Layout, train_sharded
from tests.support import cuda_graphs
from tests.support.oracle import BETAS, DEVICES, INTERPRETED, gradient_history

DEVICE = DEVICES["triton"]
FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    if DEVICE.type != "cuda":
        cuda_graphs.use(monkeypatch)
    with counted() as counts:
        yield counts


@pytest.mark.parametrize(
    ("momentum", "bias_correction"), [(FP32, True), (BF16, False), (INT8, True)], ids=str
)
def test_replayed_steps_are_those_that_python_launches(momentum, bias_correction, graphs):
    settings = {"bias_correction": bias_correction}
    replayed = trained(DEVICE, momentum, cuda_graph=True, **settings)
    assert graphs == {"captures": 1, "replays": STEPS - WARM_UP}
    launched = trained(DEVICE, momentum, **settings)
    assert graphs["replays"] == STEPS - WARM_UP
    assert all(map(torch.equal, replayed, launched))


@pytest.mark.parametrize(
    "momentum",
    [INT8, *(pytest.param(momentum, marks=INTERPRETED) for momentum in (FP32, BF16))],
    ids=str,
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_is_not_replayed(change, momentum, graphs):
    replayed = trained(DEVICE, momentum, change=change, cuda_graph=True)
    launched = trained(DEVICE, momentum, change=change)
    assert all(map(torch.equal, replayed, launched))
    # Rates, decays and betas are read anew by a graph; an odd number of steps, where it is the seed
    # of rounding, comes in another table. After a graph that was dropped it takes twice as long.
    dropped = not (change is other_settings and momentum == FP32)
    warm_up = 2 * WARM_UP if change in (moved, missing, other_dtype, other_settings) else WARM_UP
    assert graphs == {"captures": 1 + dropped, "replays": STEPS - WARM_UP - dropped * warm_up}
    assert CHANGED + warm_up < STEPS


def test_a_capture_that_fails_changes_nothing(monkeypatch):
    replayed = []
    for fails in (False, True):
        param = torch.nn.Parameter(torch.ones(6, 4, device=DEVICE))
        param.grad = torch.arange(24.0, device=DEVICE).view(6, 4)
        optimizer = CAME([param], lr=1e-2, kernels="triton", cuda_graph=True)
        for step in range(4):
            if fails and step == 2:
                with monkeypatch.context() as patch:
                    refuse = mock.Mock(side_effect=RuntimeError("not now"))
                    patch.setattr(Device, "captured", refuse)
                    optimizer._plan.local[0]._passes[0][1].replays["step"]._graph = None
                    with pytest.raises(RuntimeError, match="not now"):
                        optimizer.step()
            optimizer.step()
        replayed.append(param.detach())
    assert torch.equal(*replayed)


def test_within_a_capture_of_the_callers_nothing_is_replayed(monkeypatch, graphs):
    monkeypatch.setattr(Device, "is_capturing", True)
    trained(DEVICE, FP32, cuda_graph=True)
    assert not graphs


def test_the_reductions_are_between_the_graphs(graphs):
    """One rank, over gloo where the GPU has NCCL."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    launched, replayed = (
        reduced_alone("triton", DEVICE, backend, dist.HashStore(), SHAPES, cuda_graph=cuda_graph)
        for cuda_graph in (False, True)
    )
    assert all(map(torch.equal, launched, replayed))
    # All passes where nothing is reduced, and each of three.
    assert (graphs["captures"], graphs["replays"]) == (4, 4 * 5)


@pytest.mark.parametrize("guard", [None, 1e6])
def test_ranks_that_hold_slices(guard, graphs):
    layouts = [Layout((24, 40), 0, ((0.4,), (0.71,))), Layout((30,), None, ((0.3,), (0.3,)))]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(each.shape, generator=generator) for each in layouts]
    histories = [gradient_history(each.shape, 5, "normal", FP32, generator) for each in layouts]
    given = 2, 2, layouts, starts, histories, BETAS[1], "triton", DEVICE
    more = {"in_place": True, "spike_guard": guard}
    launched = train_sharded(*given, **more)
    assert not graphs
    replayed = train_sharded(*given, **more, cuda_graph=True)
    assert all(map(torch.equal, launched, replayed))
    assert graphs["replays"] == 4 * 3 * (5 - WARM_UP)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kernels": "numba"}, "not for kernels 'numba' on cpu: leave it out"),
        ({"kernels": "auto"}, "not for kernels 'auto' on cpu: leave it out"),
        ({"cuda_graph": 1}, "cuda_graph = 1 is not allowed; it must be True or False"),
    ],
)
def test_graphs_that_cannot_be_had_are_refused(settings, sentence, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=sentence):
        CAME([torch.nn.Parameter(torch.ones(2, 3))], **{"cuda_graph": True, **settings})
