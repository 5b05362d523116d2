"""Stand-ins for what Megatron finds on a GPU, without starting Megatron."""

from argparse import Namespace

import pytest
import torch

from megatron_came.cpu_megatron import devices
from megatron_came.cpu_megatron.arguments import RULES
from megatron_came.cpu_megatron.parallel_layers import _center_at_zero
from megatron_came.rules import refusal
from tests.support.running import run_python


@pytest.mark.parametrize("name", ["stream", "device"])
def test_a_stream_and_a_device_can_be_entered_again(name):
    """Megatron keeps one context for all buckets of two optimizer instances."""
    context = devices._cuda_functions()[name](devices.Stream())
    for _ in range(2):
        with context, context:
            pass


STILL_A_CPU = """
import torch
from megatron_came.cpu_megatron import devices

class MadeThere(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.empty(grad.shape, device=0).copy_(grad)

devices.install()
for backward in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
    values = torch.ones(3, requires_grad=True)
    total = MadeThere.apply(values).sum()
    backward(*(total, values)[: 1 + (backward is torch.autograd.grad)])
"""


def test_a_backward_pass_within_another_finds_no_gpu_either():
    """Recomputed layers go backward so; experts' then gather into a tensor of device 0."""
    done = run_python("-c", STILL_A_CPU)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_norms_with_weights_around_zero(kind):
    norm, usual = kind(12), kind(12)
    _center_at_zero(norm)
    assert torch.equal(norm.weight, torch.zeros(12))
    weights, tokens = torch.randn(12), torch.randn(5, 12)
    with torch.no_grad():
        norm.weight.copy_(weights)
        usual.weight.copy_(weights + 1)
        for param in (norm, usual):
            if kind is torch.nn.LayerNorm:
                param.bias.fill_(0.5)
    for module in (norm, usual):
        module(tokens).square().sum().backward()
    assert torch.equal(norm(tokens), usual(tokens))
    assert torch.equal(norm.weight.grad, usual.weight.grad)


def test_norms_without_weights_stay_what_they_are():
    module = torch.nn.Identity()
    _center_at_zero(module)
    assert type(module) is torch.nn.Identity


@pytest.mark.parametrize("module", ["layernorm", "moe_act"])
def test_what_transformer_engine_recomputes_is_refused(module):
    message = refusal(RULES, Namespace(recompute_modules=["core_attn", module]))
    assert message.startswith(f"--recompute-modules {module} needs Transformer Engine")
    assert refusal(RULES, Namespace(recompute_modules=["core_attn", "mlp", "moe"])) is None
