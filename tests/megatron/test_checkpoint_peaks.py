"""What saving and loading take on a GPU beside what is there; its tensors are simulated.

PyTorch's fake tensors have a device and a size and no memory: all bytes that the operations on
``cuda`` would have allocated are counted, without a GPU.
"""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_came import CAME
from megatron_came.core.digests import Added, PlacedBox, _sum
from megatron_came.core.saved import MOST_BYTES, main_ranges, momentum_ranges
from megatron_came.megatron.checkpoints.digests import sums
from megatron_came.megatron.checkpoints.digests.leaves import Entry, Leaf

MIB = 2**20
BOUND = MOST_BYTES
SHAPE, COUNT = (4096, 2048), 8  # 8 M elements each: 6 bytes of each would be 384 MiB


class CudaBytes(TorchDispatchMode):
    """Counts the bytes of all storages on a GPU that are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        if storage not in self._known:
            self._known.add(storage)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)

    @contextmanager
    def at_most(self, bound):
        """Hold what is allocated meanwhile, at its peak, to a number of bytes."""
        steady = self.peak = self.now
        yield
        assert self.peak - steady <= bound, f"{(self.peak - steady) / MIB:.0f} MiB"


@pytest.fixture
def gpu(monkeypatch):
    """Tensors on a GPU that are simulated, and a count of their bytes."""
    # They have no values; it makes nothing of a tensor's size.
    monkeypatch.setattr(torch, "aminmax", lambda values: (0.0, 0.0))
    with FakeTensorMode(), CudaBytes() as count:
        yield count


def simulated(momentum, remainders):
    """A distributed optimizer, its parameters on the GPU."""
    from tests.support.simulated_optimizers import SimulatedOptimizer

    dtype = torch.bfloat16 if remainders else torch.float32
    numel = SHAPE[0] * SHAPE[1]
    params = [torch.nn.Parameter(torch.zeros(SHAPE, device="cuda")) for _ in range(COUNT)]
    local = [
        torch.nn.Parameter(torch.zeros(numel, device="cuda", dtype=dtype)) for _ in range(COUNT)
    ]
    settings = {"momentum_dtype": momentum, "remainders": remainders, "kernels": "plain"}
    came = CAME(local, lr=1e-3, **settings)
    came.init_state()
    return SimulatedOptimizer(dict(zip(params, local, strict=True)), came)


def test_a_tensor_of_the_size_of_the_state_is_seen(gpu):
    with pytest.raises(AssertionError, match="128 MiB"), gpu.at_most(BOUND):
        torch.zeros(2**24, device="cuda").add(0).cpu()  # the second is made beside the first
    assert gpu.now == 0


STATES = pytest.mark.parametrize(
    ("momentum", "remainders"),
    [(torch.int8, True), (torch.int8, False), (torch.bfloat16, True), (torch.float32, False)],
)


@STATES
def test_saving_and_loading_a_distributed_optimizer(gpu, momentum, remainders):
    optimizer = simulated(momentum, remainders)
    for is_loading in (False, True):
        optimizer._is_loading = is_loading
        # An fp32 model's momentum and weights are saved, and momentum loaded, where they are.
        with gpu.at_most(BOUND):
            state = optimizer.get_parameter_state_dp_reshardable()
            if is_loading:
                for piece, *_ in state[0][torch.float32]:
                    piece["padding"] = False
                optimizer.load_parameter_state_from_dp_reshardable(state)
    assert len(state[0][torch.float32]) == COUNT


@STATES
def test_loading_an_optimizer_from_itself(gpu, momentum, remainders):
    """As Megatron does before it loads a distributed checkpoint; one parameter's state is made."""
    came = simulated(momentum, remainders).optimizer
    with gpu.at_most(BOUND):
        came.load_state_dict(came.state_dict())


def test_loading_momentum_in_fp32_into_int8(gpu):
    """As of a checkpoint without the distributed optimizer; that of a run that begins is zero."""
    came = simulated(torch.int8, False).optimizer
    loaded = came.state_dict()
    for key, state in loaded["state"].items():
        loaded["state"][key] = {**state, "exp_avg": torch.zeros(state["exp_avg"].shape)}
    with gpu.at_most(BOUND):
        came.load_state_dict(loaded)


def test_digests(gpu, monkeypatch):
    def adder(device):
        return lambda terms: [Added(len(_sum(*term)), True) for term in terms]

    monkeypatch.setattr(sums, "adder", adder)
    optimizer = simulated(torch.int8, True)
    with gpu.at_most(BOUND):
        found = sums.Sums({})
        for param, local in optimizer._pairs:
            leaf = Leaf("weight", PlacedBox.whole(SHAPE), True, True)
            entry, state = Entry(param, (leaf,)), optimizer.optimizer.state[local]
            found.add_slice(("main weights",), entry, main_ranges(local, state), 0)
            found.add_slice(("momentum",), entry, momentum_ranges(state), 0)
        found.flush()
