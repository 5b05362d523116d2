"""Check the Triton kernels on a GPU and time them: what ``make gpu-check`` runs.

    python scripts/gpu_check.py [FOLDER]

Needs PyTorch, with NumPy, and Triton, with the C compiler that it builds its launchers with; what
else is installed (came-pytorch, apex, Transformer Engine) is timed too. The results go to FOLDER
(default: benchmarks/results) as JSON.
"""

import importlib.util
import sys
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_came import CAME
from megatron_came.bench import command
from megatron_came.bench.peak import peak_of
from megatron_came.kernels.triton.backend import TritonBackend
from megatron_came.kernels.triton.tiling import Tiling
from scripts.cases.kernels import (
    CASES,
    TOLERANCE,
    bad_gradients,
    model_weights_after_steps,
    train,
    weights_after_moves,
    worst_distance,
)
from scripts.cases.slices import Layout, train_sharded

CUDA = torch.device("cuda")
# (model, layers)
SIZES = [
    ("gpt2-nano", None),
    ("gpt2-small", None),
    ("gpt2-medium", None),
    ("gpt2-xl", 36),
]


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


def check_smaller_state(momentum: torch.dtype) -> None:
    """Momentum in 16 or 8 bits, with remainders, is that of the plain path but for last bits."""
    results = {}
    for path, device in (("plain", torch.device("cpu")), ("triton", CUDA)):
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(shape, generator=generator) for shape in ((300, 200), (2, 33, 70))]
        params = [torch.nn.Parameter(start.to(device, torch.bfloat16)) for start in starts]
        optimizer = CAME(params, lr=1e-2, kernels=path, momentum_dtype=momentum, remainders=True)
        for _ in range(3):
            for param in params:
                param.decoupled_grad = torch.randn(param.shape, generator=generator).to(device)
            optimizer.step()
        results[path] = torch.cat([optimizer.state[p]["exp_avg"].cpu().view(-1) for p in params])
    different = (results["plain"] != results["triton"]).double().mean().item()
    assert different < 0.005, different
    print(f"ok  {momentum} momentum: {different:.2%} of the elements differ from the plain path")


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
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            results.append((param.detach() - start, optimizer.state[param]["exp_avg"]))
        (plain, plain_momentum), (ours, our_momentum) = results
        if momentum == torch.float32:
            assert (ours - plain).norm() <= 2 * TOLERANCE * plain.norm()
        else:  # rounded with the same bits
            different = (plain_momentum != our_momentum).double().mean().item()
            assert different < 0.005, f"{momentum}: {different}"
    print("ok  large steps, without waiting for the GPU", flush=True)


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


def main() -> None:
    """Check, then time models from ten million to more than a billion parameters."""
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: there is no GPU here.")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results"
    check_cases()
    check_bad_gradients()
    check_smaller_state(torch.bfloat16)
    check_smaller_state(torch.int8)
    check_model_weights()
    check_moves()
    check_slices()
    check_large_steps()
    for momentum in (torch.float32, torch.bfloat16, torch.int8):
        check_graph_capture(momentum)
    if importlib.util.find_spec("came_pytorch") is None:
        print("came-pytorch is not installed: the authors' optimizer will not be timed.")
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    day = datetime.now(UTC).date().isoformat()
    for model, layers in SIZES:
        name = f"{day}-{device}-{model}{f'-{layers}' if layers else ''}.json"
        options = ["--model", model, "--steps", "30", "--json", str(folder / name)]
        options += ["--layers", str(layers)] if layers else []
        if command.main(options):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
