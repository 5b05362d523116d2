"""Norms of 16-bit gradients where neither apex nor Transformer Engine computes them."""

import torch

from megatron_came.megatron.install import install


def test_the_norm_of_bf16_gradients_is_fp32():
    install()
    from megatron.core.optimizer import clip_grads

    grads = [torch.randn(n).to(torch.bfloat16) for n in (1000, 33)]
    norm, _ = clip_grads.l2_norm_impl(65536, None, [grads], False)
    exact = torch.cat(grads).double().norm()
    assert norm.dtype == torch.float32
    assert norm.shape == (1,)
    assert abs(norm.item() / exact.item() - 1) < 1e-6
