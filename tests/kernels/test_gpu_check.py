"""What ``make gpu-check`` runs on a GPU, as far as it can be run without one."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_came.bench import measure
from scripts import gpu_check
from scripts.cases.production import (
    ALIGNED,
    BF16,
    FP32,
    INT8,
    SETTINGS,
    UNALIGNED,
    Setting,
    problem,
    reduced_alone,
)
from scripts.gpu_times import bytes_of, kernel_times, modelled, table
from tests.support.oracle import DEVICES, ON_REAL_DEVICES

QUICK = {Setting(BF16, FP32, "model"), Setting(BF16, INT8, "remainder")}


@pytest.mark.parametrize("shapes", [ALIGNED, UNALIGNED], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(each, marks=() if each in QUICK else pytest.mark.interpreted, id=each.name)
        for each in SETTINGS
    ],
)
def test_precisions_under_the_interpreter_or_on_a_gpu(setting, shapes):
    assert problem(setting, shapes, "triton", DEVICES["triton"]) is None


def test_a_wrong_weight_is_a_problem(monkeypatch):
    from megatron_came.core import passes

    right = passes.apply_update
    monkeypatch.setattr(
        passes, "apply_update", lambda *a, lr, **more: right(*a, lr=1.001 * lr, **more)
    )
    setting = Setting(FP32, FP32, "fp32")
    assert "away" in problem(setting, UNALIGNED, "numba", torch.device("cpu"))


@pytest.mark.parametrize("kernels", ON_REAL_DEVICES)
def test_sums_that_one_rank_reduces_alone(kernels):
    """Over gloo, where the GPU has NCCL."""
    device = DEVICES[kernels]
    backend = "nccl" if device.type == "cuda" else "gloo"
    alone, reduced = reduced_alone(kernels, device, backend, dist.HashStore())
    assert torch.equal(alone, reduced)


@pytest.mark.matrix
def test_the_training_run():
    """On a CPU, which needs none of its flags for GPUs."""
    gpu_check.check_training("cpu")


def test_what_fails_keeps_nothing_from_being_tried(capsys):
    ran = []

    def fails():
        raise ValueError("one\ntwo")

    assert gpu_check.run_checks([fails, lambda: ran.append(1)]) == ["fails: ValueError two"]
    assert ran == [1]
    assert "in fails" in capsys.readouterr().err


def test_the_bandwidth_of_a_copy_is_by_the_gpus_clock(monkeypatch):
    """Simulated: a clock by which each copy takes 2 ms."""
    monkeypatch.setattr(measure, "_COPY_BYTES", 4_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 2.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    assert measure.copy_bandwidth(torch.device("cpu")) == 2 * 4_000_000 / 2e-3


def test_kernel_times_stand_beside_the_models():
    """Simulated: what a profiler has seen of five steps, and a GPU."""
    setting, gpu = Setting(BF16, INT8, "remainder"), {"sms": 100, "gigahertz": 1.0, "apply_x": 64.0}
    assert bytes_of(setting) == (2, 3, 2 + 2 + 8)
    events = [
        ("square_x", 10, 5e3),
        ("apply_x", 5, 25e3),
        ("apply_vectors", 5, 5e2),
        ("gone", 5, 0),
    ]
    times = kernel_times(events, 5, setting, 10**9, 1000.0, gpu)
    assert [each.kernel for each in times] == ["apply_x", "square_x", "apply_vectors"]
    assert [each.launches for each in times] == [1, 2, 1]
    assert [each.milliseconds for each in times] == [5.0, 1.0, 0.1]
    # Of pass 3 12 bytes at 1000 GB/s, and 64 instructions at 100 x 128 x 1 GHz.
    assert times[0].modelled == pytest.approx(max(12.0, 5.0))
    assert modelled("apply_x", setting, 10**9, 1e6, gpu) == pytest.approx(5.0)
    assert [each.modelled for each in times[1:]] == [pytest.approx(2.0), None]
    assert len(table(times)) == 4
