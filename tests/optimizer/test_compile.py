"""``torch.compile`` around a step, in whatever it is used: the step is what it is without."""

import functools

import pytest
import torch

from megatron_came import CAME
from tests.support.oracle import distance, gradient_history

BACKENDS = ["eager", "aot_eager"]  # where a step is traced, both show what Inductor would be given
SHAPES = ((20, 30), (7,), (2, 5, 4))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def histories(dtype):
    generator = torch.Generator().manual_seed(0)
    return [gradient_history(shape, 4, "spikes", dtype, generator) for shape in SHAPES]


def train(wrap, kernels, dtype=torch.float32, **settings):
    """Weights and state after four steps of ``wrap(optimizer)``."""
    generator = torch.Generator().manual_seed(1)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]
    optimizer = CAME(params, lr=1e-2, kernels=kernels, weight_decay=0.1, **settings)
    step = wrap(optimizer)
    for number in range(4):
        for param, history in zip(params, histories(dtype), strict=True):
            param.grad = history[number].clone()
        step()
        if number == 1:
            optimizer.load_state_dict(optimizer.state_dict())
    state = [value for param in params for value in optimizer.state[param].values()]
    return [*(param.detach() for param in params), *state]


def uncompiled(optimizer):
    return optimizer.step


def compiled_step(optimizer, backend):
    return torch.compile(optimizer.step, backend=backend)


def compiled_loop(optimizer, backend):
    def loop():
        optimizer.step()

    return torch.compile(loop, backend=backend)


def assert_same(ours, theirs):
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kernels", ["plain", "numba"])
@pytest.mark.parametrize(
    ("wrap", "backend", "dtype"),
    [
        *(
            (wrap, how, torch.float32)
            for wrap in (compiled_step, compiled_loop)
            for how in BACKENDS
        ),
        (compiled_step, "aot_eager", torch.bfloat16),
        (compiled_loop, "eager", torch.float64),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_compiled_step_is_the_step(wrap, kernels, backend, dtype):
    compiled = train(functools.partial(wrap, backend=backend), kernels, dtype)
    assert_same(compiled, train(uncompiled, kernels, dtype))


@pytest.mark.parametrize("momentum", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kernels", ["plain", "numba"])
def test_with_small_state_and_a_rate_in_a_tensor(kernels, momentum):
    settings = {"momentum_dtype": momentum, "remainders": True, "dtype": torch.bfloat16}
    results = []
    for wrap in (uncompiled, functools.partial(compiled_step, backend="aot_eager")):

        def with_rate(optimizer, wrap=wrap):
            optimizer.param_groups[0]["lr"] = torch.tensor(3e-3)
            return wrap(optimizer)

        results.append(train(with_rate, kernels, **settings))
    assert_same(*results)


def training(kernels, compile_with, *, in_closure=False):
    """Train a small model; return its weights and the last loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = CAME(model.parameters(), lr=1e-2, kernels=kernels)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    data, goal = torch.randn(5, 6), torch.randn(5, 3)

    def backward():
        optimizer.zero_grad()
        loss = (model(data) - goal).square().mean()
        loss.backward()
        return loss

    def iteration():
        loss = optimizer.step(backward) if in_closure else backward()
        if not in_closure:
            optimizer.step()
        return loss

    run = iteration if compile_with is None else torch.compile(iteration, backend=compile_with)
    for _ in range(4):
        loss = run()
        scheduler.step()
    return torch.cat([param.detach().view(-1) for param in model.parameters()]), loss.detach()


@pytest.mark.parametrize("in_closure", [False, True])
@pytest.mark.parametrize("kernels", ["plain", "numba"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_training_step(kernels, backend, in_closure):
    weights, _ = training(kernels, None, in_closure=in_closure)
    compiled, loss = training(kernels, backend, in_closure=in_closure)
    torch.manual_seed(0)
    assert torch.isfinite(loss)
    assert distance(compiled, weights, torch.zeros_like(weights)) < 1e-6


def step_of(optimizer, param):
    optimizer.step()


def test_a_step_in_a_hook_of_a_compiled_model():
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        optimizers = {p: CAME([p], lr=1e-2, kernels="plain") for p in model.parameters()}
        for param, optimizer in optimizers.items():
            param.register_post_accumulate_grad_hook(
                lambda _, optimizer=optimizer: optimizer.step()
            )
        run = torch.compile(model, backend="aot_eager") if is_compiled else model
        for _ in range(3):
            run(torch.ones(2, 6)).square().sum().backward()
            model.zero_grad()
        results.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    assert torch.allclose(*results, rtol=1e-6)


def test_one_whole_graph_is_refused_in_words():
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = CAME([param], lr=1e-2)
    param.grad = torch.ones(4, 3)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|leave fullgraph=True out"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert torch.equal(param, torch.ones(4, 3))


@pytest.mark.matrix
@pytest.mark.parametrize("kernels", ["plain", "numba"])
def test_inductor(kernels):
    wrap = functools.partial(compiled_step, backend="inductor")
    assert_same(train(wrap, kernels), train(uncompiled, kernels))
    weights, _ = training(kernels, None)
    compiled, _ = training(kernels, "inductor")
    assert distance(compiled, weights, torch.zeros_like(weights)) < 1e-5
