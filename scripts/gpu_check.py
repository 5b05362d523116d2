"""Check the Triton kernels on a GPU and time them: what ``make gpu-check`` runs.

    python scripts/gpu_check.py [FOLDER]

Needs PyTorch, with NumPy, and Triton, with the C compiler that it builds its launchers with; what
else is installed (megatron-core, came-pytorch, apex, Transformer Engine) is tried and timed too.
The results go to FOLDER (default: benchmarks/results) as JSON. It should take less than eight
minutes; **it has not run on a GPU yet**, but its cases run under Triton's interpreter in the tests.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_came import CAME
from megatron_came.bench import command
from megatron_came.bench.machine import describe
from megatron_came.bench.measure import copy_bandwidth
from megatron_came.bench.peak import peak_of
from megatron_came.kernels.dispatch import choose
from megatron_came.kernels.triton.passes import TritonBackend
from megatron_came.kernels.triton.tiling import Tiling
from scripts.cases.graphs import CHANGES, STEPS, WARM_UP, counted, trained
from scripts.cases.kernels import (
    CASES,
    TOLERANCE,
    bad_gradients,
    model_weights_after_steps,
    train,
    weights_after_moves,
    worst_distance,
)
from scripts.cases.production import ALIGNED, SETTINGS, UNALIGNED, problem, reduced_alone
from scripts.cases.slices import Layout, train_sharded
from scripts.gpu_times import MODEL, TIMED, time_setting

CUDA = torch.device("cuda")
# Of a small GPT, as large runs have it, with Megatron's own layers.
TRAINING = """
    --standalone --nproc-per-node 1 -m megatron_came.pretrain_gpt
    --num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --tokenizer-type NullTokenizer --vocab-size 1023 --mock-data
    --micro-batch-size 2 --global-batch-size 2 --train-iters 3 --eval-iters 0 --eval-interval 1000
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 1 --weight-decay 0.1
    --clip-grad 1.0 --log-interval 1 --bf16 --grad-reduce-in-bf16 --use-distributed-optimizer
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --num-workers 0
    --optimizer came --came-momentum-dtype int8 --came-main-params remainder --came-report-memory
"""
# (model, layers)
SIZES = [("gpt2-nano", None), ("gpt2-small", None), ("gpt2-medium", None), ("gpt2-xl", 36)]


def check_cases() -> None:
    """The kernels equal the plain path in float64, and themselves bit for bit."""
    for case in CASES:
        distance = worst_distance(case, "triton", CUDA)
        assert distance <= TOLERANCE, f"{case.name}: {distance}"
        first, second = (train(case, "triton", CUDA, torch.float32) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case.name
        print(f"ok  {case.name}: {distance:.1e} of the update", flush=True)
    with mock.patch.object(TritonBackend, "cache_elements", 1000):
        assert all(worst_distance(case, "triton", CUDA) <= TOLERANCE for case in CASES)
    print("ok  the same in sets that fit a cache", flush=True)
    for tiling in (
        Tiling(8, 64, 3, addition=16, tallest=64),
        Tiling(8, 16, 1, addition=16, tallest=32),
    ):
        with mock.patch.object(TritonBackend, "tiling", tiling):
            assert all(worst_distance(case, "triton", CUDA) <= TOLERANCE for case in CASES)
    print("ok  the same in higher tiles", flush=True)


def check_bad_gradients() -> None:
    """NaN and infinity reach the weights that they reach on the plain path."""
    ours, plain = bad_gradients("triton", CUDA), bad_gradients("plain", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    print("ok  what is not finite is not hidden", flush=True)


def check_production() -> None:
    """Each precision of gradients, momentum and weights, in rows of whole vector loads and not."""
    for setting in SETTINGS:
        for shapes in (ALIGNED, UNALIGNED):
            found = problem(setting, shapes, "triton", CUDA)
            assert found is None, f"{setting.name}, {shapes}: {found}"
        print(f"ok  {setting.name}", flush=True)


def check_nccl() -> None:
    """Sums that NCCL reduces, on one rank, are those of a rank without process groups."""
    for cuda_graph in (False, True):
        settings = {"cuda_graph": cuda_graph}
        with counted() as counts:
            found = reduced_alone("triton", CUDA, "nccl", dist.HashStore(), **settings)
        assert torch.equal(*found)
        assert counts["replays"] == cuda_graph * 4 * 5  # of one schedule, and of three
    print("ok  sums reduced by NCCL, on one rank, and between CUDA graphs", flush=True)


def check_training(device: str = "cuda") -> None:
    """Three iterations of Megatron's own training loop, where megatron-core is installed."""
    if importlib.util.find_spec("megatron") is None:
        print("megatron-core is not installed: no training run.", flush=True)
        return
    on_cpu = "1" if device == "cpu" else "0"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *TRAINING.split()],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_CAME_CPU": on_cpu, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if "iteration " in line and "loss:" in line]
    assert (done.returncode, len(lines)) == (0, 3), done.stdout[-4000:]
    losses = [float(line.split("lm loss: ")[1].split()[0]) for line in lines]
    assert all(map(math.isfinite, losses)), losses
    used = "Numba's kernels" if device == "cpu" else "Triton's kernels"
    assert used in done.stdout, done.stdout[-4000:]
    print(f"ok  three iterations of Megatron, losses {losses}", flush=True)


def check_model_weights() -> None:
    """16-bit model weights are rewritten, wherever they lie."""
    for dtype in (torch.bfloat16, torch.float16):
        for weight, expected in model_weights_after_steps("triton", CUDA, dtype):
            assert torch.equal(weight, expected), dtype
    print("ok  16-bit model weights", flush=True)


def check_moves() -> None:
    """Tensors that the host moves between steps are found."""
    moved, others = (weights_after_moves("triton", CUDA, moves) for moves in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(moved, others, strict=True))
    print("ok  tensors that have moved", flush=True)


def check_slices() -> None:
    """Ranks, as threads, that hold slices of tensors together equal one that holds them whole."""
    shapes = {(48, 80): 1, (98,): 0, (6, 14, 10): 0, (30, 20): None}
    cuts = ((0.3, 0.3, 0.71),) * 2  # an empty slice, and bounds within rows
    tensors = [Layout(shape, tp_dim, cuts) for shape, tp_dim in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    histories = [[torch.randn(s, generator=generator) for _ in range(4)] for s in shapes]
    betas = (0.9, 0.999, 0.9999)
    sliced = train_sharded(2, 4, tensors, starts, histories, betas, "triton", CUDA)
    starts, histories = (
        [start.double() for start in starts],
        [[gradient.double() for gradient in history] for history in histories],
    )
    whole = [Layout(shape, None, ((),)) for shape in shapes]
    plain = train_sharded(1, 1, whole, starts, histories, betas, "plain", torch.device("cpu"))
    for ours, theirs, start in zip(sliced, plain, starts, strict=True):
        distance = ((ours - theirs).norm() / (theirs - start).norm()).item()
        assert distance <= TOLERANCE, f"{tuple(start.shape)}: {distance}"
    print("ok  slices on eight ranks", flush=True)


def check_large_steps() -> None:
    """A step of much takes little memory, its buffers included, and does not wait for the GPU.

    The kernels' tiles are as high as those of GPT-2 medium, and its result that of plain PyTorch.
    """
    start = torch.randn(80_000, 4096, device=CUDA)
    gradient = torch.randn_like(start)
    bound = 64 * 2**20 + 0.01 * start.nbytes
    for momentum in (torch.float32, torch.bfloat16, torch.int8):
        results = []
        for path in ("plain", "triton"):
            param = torch.nn.Parameter(start.clone())
            param.grad = gradient
            optimizer = CAME([param], lr=1e-2, kernels=path, momentum_dtype=momentum)
            optimizer.init_state()
            taken = peak_of(optimizer.step, CUDA)
            assert taken <= bound, f"{path}, {momentum}: {taken} bytes"
            print(f"ok  {path}, {momentum} momentum: {taken / 2**20:.1f} MiB in a first step")
            optimizer.step()
            if path == "triton":
                torch.cuda.set_sync_debug_mode("error")
            try:
                for rate in (5e-3, 2e-3):  # as a schedule changes it
                    optimizer.param_groups[0]["lr"] = rate
                    optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            results.append((param.detach() - start, optimizer.state[param]["exp_avg"]))
        (plain, plain_momentum), (ours, our_momentum) = results
        if momentum == torch.float32:
            assert (ours - plain).norm() <= 2 * TOLERANCE * plain.norm()
        else:  # rounded with the same bits
            different = (plain_momentum != our_momentum).double().mean().item()
            assert different < 0.005, f"{momentum}: {different}"
    print("ok  large steps at changing rates, without waiting for the GPU", flush=True)


def check_graph_capture(momentum: torch.dtype) -> None:
    """A step captured in a CUDA graph, with the learning rate in a tensor, equals one outside."""
    torch.manual_seed(0)
    start = [torch.randn(shape, device=CUDA) for shape in ((300, 200), (77,))]
    grads = [[torch.randn_like(value) for value in start] for _ in range(6)]
    rates = [1e-2, 1e-2, 1e-2, 5e-3, 2e-3, 1e-3]

    def make():
        params = [torch.nn.Parameter(value.clone()) for value in start]
        for param in params:
            param.grad = torch.zeros_like(param)
        rate = torch.tensor(rates[0], device=CUDA)
        settings = {"weight_decay": 0.1, "kernels": "triton", "momentum_dtype": momentum}
        return params, rate, CAME(params, lr=rate, **settings)

    def feed(params, rate, step):
        rate.fill_(rates[step])
        for param, grad in zip(params, grads[step], strict=True):
            param.grad.copy_(grad)

    outside, rate, optimizer = make()
    for step in range(6):
        feed(outside, rate, step)
        optimizer.step()

    inside, rate, optimizer = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as PyTorch asks for
        for step in range(3):
            feed(inside, rate, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 6):
        feed(inside, rate, step)
        graph.replay()
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)
    print(f"ok  a step with {momentum} momentum in a CUDA graph, at changing rates", flush=True)


def check_replays(momentum: torch.dtype) -> None:
    """Steps that CAME replays as CUDA graphs equal those from Python, whatever has changed."""
    for change in (None, *CHANGES):
        with counted() as counts:
            replayed = trained(CUDA, momentum, change=change, cuda_graph=True)
        launched = trained(CUDA, momentum, change=change)
        assert all(map(torch.equal, replayed, launched)), change
        assert counts["replays"] >= STEPS - 3 * WARM_UP, (change, counts)
    print(f"ok  steps with {momentum} momentum, replayed as CUDA graphs", flush=True)


def run_checks(checks: Iterable[Callable[[], None]]) -> list[str]:
    """Run all checks; return those that have failed, with the last line of what they say."""
    failed = []
    for check in checks:
        try:
            check()
        except Exception as error:
            traceback.print_exc()
            name = getattr(check, "func", check).__name__
            last = (str(error).strip().splitlines() or [""])[-1]
            failed.append(f"{name}: {type(error).__name__} {last}")
    return failed


def time_all(folder: Path) -> None:
    """Time the kernels, then models from ten million to more than a billion parameters."""
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    stem = f"{datetime.now(UTC).date().isoformat()}-{device}"
    gigabytes = copy_bandwidth(CUDA) / 1e9
    print(f"\nA copy of 2 GiB moves {gigabytes:.0f} GB/s, read and written.", flush=True)
    found = [time_setting(setting, CUDA, gigabytes) for setting in TIMED]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stem}-kernels.json"
    report = {"copy_gigabytes_per_second": gigabytes, "model": MODEL, "settings": found}
    file.write_text(json.dumps({"machine": describe(CUDA), **report}, indent=1) + "\n")
    if importlib.util.find_spec("came_pytorch") is None:
        print("came-pytorch is not installed: the authors' optimizer will not be timed.")
    for model, layers in SIZES:
        name = f"{stem}-{model}{f'-{layers}' if layers else ''}.json"
        options = ["--model", model, "--steps", "30", "--json", str(folder / name)]
        options += ["--layers", str(layers)] if layers else []
        assert command.main(options) == 0, f"megatron-came bench {' '.join(options)}"


def main() -> int:
    """Check, then time; what fails keeps nothing else from being tried."""
    if not torch.cuda.is_available():
        print("gpu_check: there is no GPU here.")
        return 2
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results"
    choice = choose("auto", CUDA)
    print(choice.reason, flush=True)
    if choice.backend.name != "triton":
        return 1
    momenta = (torch.float32, torch.bfloat16, torch.int8)
    failed = run_checks(
        [
            check_cases,
            check_bad_gradients,
            check_production,
            check_model_weights,
            check_moves,
            check_slices,
            check_large_steps,
            *(partial(check_graph_capture, momentum) for momentum in momenta),
            *(partial(check_replays, momentum) for momentum in momenta),
            check_nccl,
            check_training,
            partial(time_all, folder),
        ]
    )
    print("\n" + ("Failed:\n  " + "\n  ".join(failed) if failed else "All checks have passed."))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
