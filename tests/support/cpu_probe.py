"""Run in a process of its own by test_cpu_megatron.py: what enabling the CPU changes, as JSON."""

import argparse
import contextlib
import io
import json
import sys
from typing import Any

import torch

from megatron_came import cpu_megatron


def tensors() -> dict[str, Any]:
    """Where tensors end up that are asked for on a GPU, and what they are called there."""
    x = torch.zeros(2, device="cuda")
    made = [
        torch.empty(1, device=torch.cuda.current_device()),
        torch.tensor([1.0], device=torch.device("cuda:0")),
        torch.full((1,), 2.0, device="cuda:0", pin_memory=True),
        x.new_empty(3, device="cuda"),
        torch.ones(1).to("cuda"),
        torch.ones(1).to(0),
        torch.ones(1).to(device="cuda", dtype=torch.bfloat16),
        torch.ones(1).cuda(non_blocking=True),
        torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight,
        torch.cuda.LongTensor([1]),
        x.pin_memory(),
    ]
    x.record_stream(torch.cuda.current_stream())
    return {
        "devices": sorted({str(tensor.device) for tensor in made}),
        "to_dtype": str(torch.ones(1).to(torch.float64, True).dtype),
        "types": [x.type(), x.bfloat16().type(), str(x.type("torch.cuda.HalfTensor").dtype)],
        "is_cuda": x.is_cuda,
    }


def device() -> dict[str, Any]:
    """What the stand-in for the GPU says of itself."""
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        sum(range(10**5))
    second.record()
    torch.cuda.nvtx.range_push("nothing")
    torch.cuda.nvtx.range_pop()
    return {
        "available": torch.cuda.is_available(),
        "elapsed": first.elapsed_time(second),
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.memory_stats()["allocated_bytes.all.peak"],
        "compiled": torch.compile(len) is len and torch.compile(dynamic=True)(len) is len,
    }


def randomness() -> dict[str, Any]:
    """How the host's and the device's random numbers depend on each other."""

    def after(draw_batches: bool) -> tuple[float, float]:
        torch.manual_seed(1)
        if draw_batches:
            loader = torch.utils.data.DataLoader(range(4), shuffle=True)  # draws from the host's
            list(loader)
        device_number = torch.rand(()).item()  # a dropout mask, say
        host = torch.get_rng_state()
        return device_number, float(host.double().sum())

    plain, loaded = after(False), after(True)
    state = torch.cuda.get_rng_state()
    ahead = torch.rand(()).item()
    torch.cuda.set_rng_state(state)
    try:
        torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))  # as a GPU saves it
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    return {
        "same_device_numbers": plain[0] == loaded[0],
        "same_host_state": plain[1] == loaded[1],
        "continued": torch.rand(()).item() == ahead,
        "refused": refused,
    }


def model_parallel_regions() -> dict[str, Any]:
    """What Megatron's tracker of random states does with dropout, and what it complains of."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(1)
    outside = torch.rand(())
    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 5)
    complaints = io.StringIO()
    with contextlib.redirect_stderr(complaints):
        draws = []
        for _ in range(2):
            with tracker.fork():
                draws.append(torch.rand(()).item())
    expected = torch.rand(2, generator=torch.Generator().manual_seed(5)).tolist()
    return {
        "inside_continues": len(set(draws)) == 2 and abs(draws[0] - expected[0]) < 1e-6,
        "outside_untouched": bool(torch.rand(()) == outside),
        "complaints": complaints.getvalue(),
    }


def parser() -> dict[str, Any]:
    """What Megatron's parser makes of no flags and of all those that are refused."""
    from megatron.training import arguments as megatron_arguments

    from megatron_came.cpu_megatron.arguments import RULES
    from megatron_came.rules import refusal

    flags = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {flag: action.dest for action in flags._actions for flag in action.option_strings}
    given = flags.parse_args(["--num-workers", "2", "--attention-backend", "auto"])
    defaults = flags.parse_args([])
    return {
        "unknown": [
            rule.flag
            for rule in RULES
            if rule.flag and "0.19" in rule.releases and known.get(rule.flag) != rule.destination
        ],
        "defaults_refused": refusal(RULES, defaults),
        "defaults": [defaults.transformer_impl, defaults.attention_backend.name],
        "given": [given.num_workers, given.attention_backend.name, refusal(RULES, given)],
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()) as announcement:
        again = [cpu_megatron.enable(), cpu_megatron.enable(), cpu_megatron.wanted()]
    probes = (tensors, device, randomness, model_parallel_regions, parser)
    answers: dict[str, Any] = {probe.__name__: probe() for probe in probes}
    answers["enabled"] = again
    answers["announcement"] = announcement.getvalue()
    json.dump(answers, sys.stdout)
