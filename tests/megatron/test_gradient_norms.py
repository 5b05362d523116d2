"""What Megatron's norms and loss scales are given of gradients in 16 bits."""

import pytest
import torch

from megatron_came.megatron.install import install

FP32, BF16 = torch.float32, torch.bfloat16


def test_the_norm_of_bf16_gradients_is_fp32():
    install()
    from megatron.core.optimizer import clip_grads

    grads = [torch.randn(n).to(BF16) for n in (1000, 33)]
    norm, _ = clip_grads.l2_norm_impl(65536, None, [grads], False)
    exact = torch.cat(grads).double().norm()
    assert norm.dtype == FP32
    assert norm.shape == (1,)
    assert abs(norm.item() / exact.item() - 1) < 1e-6


def optimizers(*dtypes, scaler=None):
    """A chain of optimizers that read gradients of these dtypes in place."""
    from megatron_came.megatron.builder import share_gradient_dtype
    from tests.support.simulated_optimizers import SimulatedOptimizer

    chain = []
    for dtype in dtypes:
        param = torch.nn.Parameter(torch.ones(4, 3))
        param.main_grad = torch.arange(12.0).view(4, 3).to(dtype)
        owned = {param: torch.ones(5)}
        chain.append(SimulatedOptimizer(owned, dtype=dtype, start=3, scaler=scaler))
    share_gradient_dtype(chain)
    return chain


@pytest.mark.parametrize(
    ("dtypes", "scaler", "shown"),
    [
        ([BF16, BF16], None, BF16),
        ([BF16, FP32], None, FP32),  # a fused norm takes both lists at once, in one dtype
        ([BF16], object(), FP32),  # torch's division by the loss scale has no bf16 on a GPU
        ([FP32], object(), FP32),
    ],
)
def test_all_gradients_of_a_chain_are_shown_in_one_dtype(dtypes, scaler, shown):
    for each, dtype in zip(optimizers(*dtypes, scaler=scaler), dtypes, strict=True):
        ((param, local),) = each._owned.items()
        for _ in range(2):
            each._copy_model_grads_to_main_grads()
            assert local.decoupled_grad.dtype == shown
            assert local.decoupled_grad.tolist() == [3, 4, 5, 6, 7]
        in_place = param.main_grad.view(-1)[3:8].data_ptr()
        assert (local.decoupled_grad.data_ptr() == in_place) == (dtype == shown)


def test_a_gradient_that_was_replaced_is_found():
    (each,) = optimizers(FP32)
    ((param, local),) = each._owned.items()
    each._copy_model_grads_to_main_grads()
    param.main_grad = torch.zeros(4, 3)
    each._copy_model_grads_to_main_grads()
    assert local.decoupled_grad.tolist() == [0] * 5
    param.main_grad.fill_(2.0)
    assert local.decoupled_grad.tolist() == [2] * 5
