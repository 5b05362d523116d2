"""What Megatron's norms and loss scales are given of gradients in 16 bits."""

from types import SimpleNamespace

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
    """A chain of optimizers that read gradients of these dtypes in place; simulated."""
    from megatron_came.megatron.builder import share_gradient_dtype
    from megatron_came.megatron.distributed import CameDistributedOptimizer

    class Optimizer(CameDistributedOptimizer):
        is_stub_optimizer, _in_place, grad_scaler = False, True, scaler

        def __init__(self, dtype):
            self.buffers = [SimpleNamespace(grad_dtype=dtype)]
            self._whole_grads = []
            self.param, self.local = torch.nn.Parameter(torch.ones(4, 3)), torch.ones(5)
            self.param.main_grad = torch.arange(12.0).view(4, 3).to(dtype)
            self._owned = {self.param: self.local}

        def _range_of(self, param):
            return 3, 8

    chain = [Optimizer(dtype) for dtype in dtypes]
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
        for _ in range(2):
            each._copy_model_grads_to_main_grads()
            assert each.local.decoupled_grad.dtype == shown
            assert each.local.decoupled_grad.tolist() == [3, 4, 5, 6, 7]
        in_place = each.param.main_grad.view(-1)[3:8].data_ptr()
        assert (each.local.decoupled_grad.data_ptr() == in_place) == (dtype == shown)


def test_a_gradient_that_was_replaced_is_found():
    (each,) = optimizers(FP32)
    each._copy_model_grads_to_main_grads()
    each.param.main_grad = torch.zeros(4, 3)
    each._copy_model_grads_to_main_grads()
    assert each.local.decoupled_grad.tolist() == [0] * 5
    each.param.main_grad.fill_(2.0)
    assert each.local.decoupled_grad.tolist() == [2] * 5
