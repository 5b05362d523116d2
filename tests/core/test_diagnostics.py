"""Figures of a step against their definitions, and in every layout the same."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from megatron_came import CAME
from megatron_came.core.diagnostics import KINDS, Sums, kind_of
from megatron_came.core.reference import outer, rms, update
from megatron_came.core.shard import Shard
from scripts.cases.slices import SETTINGS, Layout, train_sharded
from tests.support.oracle import BETAS, DEVICES, gradient_history, with_all_kernels
from tests.support.slices import MID_ROW

BETA1, *_ = BETAS[1]
LR = SETTINGS["lr"]
# Few enough rows that all are looked at.
SHAPES = {
    "layers.0.attention.weight": (8, 40),
    "layers.0.experts.weight": (2, 4, 30),
    "layers.0.norm.weight": (50,),
    "layers.1.mlp.weight": (7, 24),
    "layers.1.mlp.bias": (9,),
}


def definitions(starts, histories, **options):
    """The figures' addends of each tensor, in float64, from the algorithm as in the paper."""
    rows = []
    for start, history in zip(starts, histories, strict=True):
        theta, state = start.double(), {}
        for gradient in history:
            update(
                theta, gradient.double(), state, eta=LR, b1=BETA1, b2=BETAS[1][1], b3=BETAS[1][2],
                eps1=1e-30, eps2=1e-16, d=1.0, weight_decay=SETTINGS["weight_decay"], **options,
            )  # fmt: skip
        gradient, m = history[-1].double(), state["m"]
        is_vector = gradient.dim() < 2
        v = state["v"] if is_vector else outer(state["r"], state["c"])
        u = gradient / v.sqrt()
        divisor = max(1.0, rms(u))
        step = m / outer(state["R"], state["C"]).sqrt() if "R" in state else m
        taken = step * (m * gradient > 0) if options.get("cautious") else step
        row = [1, divisor > 1, divisor, u.numel(), u.square().sum()]
        row += [(LR * taken).square().sum(), theta.square().sum()]
        of_matrix = [u.numel(), ((u / divisor - m) ** 2).sum(), m.square().sum()]
        row += [0] * 4 if is_vector else [*of_matrix, step.square().sum()]
        rows.append(torch.tensor([float(each) for each in row], dtype=torch.float64))
    return torch.stack(rows)


def figures(rows):
    tensors, clipped, divisors, numel, squares, applied, weights, *rest = rows.sum(0).tolist()
    found = {
        "update_rms": math.sqrt(squares / numel),
        "clipped_share": clipped / tensors,
        "clip_divisor_mean": divisors / tensors,
        "clip_divisor_max": float(rows[:, 2].max()),
        "relative_update": math.sqrt(applied / weights),
    }
    matrices, instability, momentum, confident = rest
    if matrices:
        found["instability"] = instability / matrices
        found["confidence"] = math.sqrt(confident / momentum)
    return found


@with_all_kernels
@pytest.mark.parametrize("options", [{}, {"cautious": True}, {"no_confidence": True}], ids=str)
def test_figures_are_what_they_are_said_to_be(kernels, options):
    if kernels == "triton" and options:
        pytest.skip("nothing that Triton's kernels do differs")
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
    histories = [
        gradient_history(shape, 5, "normal", torch.float32, generator) for shape in SHAPES.values()
    ]
    histories[0][-1] *= 7.0  # one is clipped far more
    params = {
        name: torch.nn.Parameter(start.clone().to(DEVICES[kernels]))
        for name, start in zip(SHAPES, starts, strict=True)
    }
    optimizer = CAME(params.items(), betas=BETAS[1], kernels=kernels, **SETTINGS, **options)
    for step in range(5):
        for param, history in zip(params.values(), histories, strict=True):
            param.grad = history[step].clone().to(param.device)
        optimizer.step()
    found = optimizer.diagnostics()
    rows = definitions(starts, histories, **options)
    kinds = [kind_of(name) for name in SHAPES]
    for kind in set(kinds):
        own = [index for index, each in enumerate(kinds) if each == kind]
        assert found[kind] == pytest.approx(figures(rows[own]), rel=2e-5)
    assert found["all"] == pytest.approx(figures(rows), rel=2e-5)
    assert found.keys() == {"all", *kinds}


LAYOUTS = [
    Layout((48, 80), None, MID_ROW),
    Layout((48, 80), 0, MID_ROW),
    Layout((48, 80), 1, MID_ROW),
    Layout((98,), None, MID_ROW),
    Layout((98,), 0, MID_ROW),
    Layout((6, 14, 10), 0, MID_ROW),
    Layout((6, 14, 10), 1, MID_ROW),
    Layout((6, 14, 10), 2, MID_ROW),
    Layout((5, 9), None, MID_ROW),
]


def sums_of(tp, dp, kernels, whole=False, **more):
    """What all ranks measured: added up, or of each that asked for whole parameters."""
    layouts = [replace(each, cuts=MID_ROW if dp > 1 else ((),) * tp) for each in LAYOUTS]
    generator = torch.Generator().manual_seed(4)
    starts = [torch.randn(each.shape, generator=generator) for each in LAYOUTS]
    histories = [
        gradient_history(each.shape, 4, "spikes", torch.float32, generator) for each in LAYOUTS
    ]
    found = []

    def look(_, optimizer, params):
        kinds = {param: KINDS[index % len(KINDS)] for index, param in enumerate(params)}
        found.append(optimizer.measure(kinds, whole=whole))

    device = DEVICES[kernels]
    train_sharded(
        tp, dp, layouts, starts, histories, BETAS[0], kernels, device, look=look, **more
    )  # fmt: skip
    if whole:
        return found
    added, largest = zip(*found, strict=True)
    return Sums(torch.stack(added).sum(0), torch.stack(largest).amax(0))


@with_all_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout_has_the_same_figures(kernels, dtype):
    whole = sums_of(1, 1, kernels, momentum_dtype=dtype)
    for tp, dp in ((2, 1), (1, 4), (2, 4)):
        cut = sums_of(tp, dp, kernels, momentum_dtype=dtype)
        # bf16 rounds a few elements otherwise, where a sum was on the verge.
        rel = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(cut.added, whole.added, rtol=rel, atol=1e-9)
        torch.testing.assert_close(cut.largest, whole.largest, rtol=1e-5, atol=0)
    assert (whole.figures()["all"].get("stale_share", 0) > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 4), (2, 4)])
def test_a_rank_that_asks_with_all_others_gets_the_figures_of_whole_parameters(tp, dp):
    whole = sums_of(1, 1, "plain")
    for one in sums_of(tp, dp, "plain", whole=True):
        torch.testing.assert_close(one.added, whole.added, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.largest, whole.largest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_stale_elements_are_those_that_moved_by_less_than_a_rounding_step(dtype):
    """Found from the momentum as it is kept, so some on the verge are taken for others."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(8, 4096))
    optimizer = CAME([("mlp", param)], lr=1e-3, momentum_dtype=dtype)
    still = torch.randn_like(param)
    for _ in range(40):
        param.grad = still + 0.2 * torch.randn_like(param)
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
    twin = torch.nn.Parameter(torch.zeros_like(param))
    exact = CAME([("mlp", twin)], lr=1e-3)  # of fp32 momentum
    exact.load_state_dict(before)
    old = exact.state[twin]["exp_avg"].clone()
    twin.grad = param.grad
    exact.step()
    moved = (exact.state[twin]["exp_avg"] - old).abs()
    if dtype == torch.int8:
        scale = optimizer.state[param]["exp_avg_scale"]
        spacing = scale.repeat_interleave(256).view_as(moved)
    else:
        spacing = 2.0 ** (exact.state[twin]["exp_avg"].frexp()[1] - 8)
    share = float((moved < spacing).double().mean())
    assert 0.1 < share < 0.95
    assert optimizer.diagnostics()["mlp"]["stale_share"] == pytest.approx(share, abs=0.02)


def test_nothing_is_measured_without_gradients_of_a_step():
    param = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = CAME([param], lr=1e-3)
    with pytest.raises(ValueError, match="call it after a step"):
        optimizer.diagnostics()
    param.grad = torch.randn(4, 6)
    optimizer.step()
    assert set(optimizer.diagnostics()) == {"all", "other"}
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"before zero_grad\(\)"):
        optimizer.diagnostics()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.weight", "attention"),
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "norm"),
        ("decoder.layers.3.self_attention.q_layernorm.weight", "norm"),
        ("decoder.layers.3.mlp.linear_fc1.bias", "mlp"),
        ("decoder.layers.3.mlp.router.weight", "mlp"),
        ("decoder.layers.3.mlp.experts.local_experts.0.linear_fc1.weight", "expert"),
        ("decoder.layers.3.mlp.experts.linear_fc1.weight5", "expert"),
        ("decoder.layers.3.mlp.shared_experts.linear_fc1.weight", "mlp"),
        ("embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "expert"),
        ("decoder.layers.0.mixer.in_proj.weight", "other"),
    ],
)
def test_kinds_of_layers(name, kind):
    assert kind_of(name) == kind


def test_replicas_count_once():
    class Group:
        def size(self):
            return 2

    param = torch.nn.Parameter(torch.randn(6, 8))
    param.grad = torch.randn(6, 8)
    elements = {}
    for name, more in {
        "whole": {},
        "duplicate": {"tp_group": Group()},
    }.items():
        optimizer = CAME([param], shards={param: Shard((6, 8), 0, 48, **more)})
        optimizer.step()
        elements[name] = optimizer.measure().added.sum(0)
    assert torch.equal(elements["duplicate"][:4] * 2, elements["whole"][:4])
