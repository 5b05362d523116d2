"""A distributed optimizer of CAME without Megatron's buffers: what it asks them is simulated."""

from types import SimpleNamespace

import torch

from megatron_came.megatron.distributed import CameDistributedOptimizer


class SimulatedOptimizer(CameDistributedOptimizer):
    """One rank of two; each parameter's slice is in a bucket of its own.

    Args:
        owned: the local tensors, by parameter of the model.
        came: that updates them.
        dtype: of gradients.
        start: of each slice in its parameter.
        scaler: of the loss.
    """

    _in_place, is_stub_optimizer = True, False

    def __init__(self, owned, came=None, *, dtype=torch.float32, start=0, scaler=None):
        self._owned, self.optimizer, self.grad_scaler = owned, came, scaler
        self._ranges = {param: (start, start + local.numel()) for param, local in owned.items()}
        self._pairs = list(owned.items())
        self._is_loading, self._whole_grads = False, []
        self.data_parallel_group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
        self.config = SimpleNamespace(momentum_dtype="fp32")
        sizes = [local.numel() for local in owned.values()]
        self.per_bucket_numel = self.per_bucket_numel_unpadded = [{dtype: sizes}]
        self.gbuf_ranges = [{dtype: [self._bucket(param) for param in owned]}]
        buckets = [
            SimpleNamespace(
                grad_data=SimpleNamespace(numel=lambda size=size: 2 * size), numel_unpadded=2 * size
            )
            for size in sizes
        ]
        self.buffers = [SimpleNamespace(grad_dtype=dtype, buckets=buckets)]

    def _range_of(self, param):
        return self._ranges[param]

    def _bucket(self, param):
        start, stop = self._ranges[param]
        own = SimpleNamespace(start=start, end=stop)
        local = SimpleNamespace(start=0, end=stop - start)
        return {"param_map": {param: {"param": own, "gbuf_local": local}}}
