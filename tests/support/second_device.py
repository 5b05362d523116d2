"""A device beside the CPU, for tests: its tensors lie in the CPU's memory, and mix with no other.

An operation of tensors of both raises, as on a GPU; copies alone go from one to the other, and are
counted.
"""

import itertools
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("meta")  # PyTorch has no guard for those it is not built for
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_ONE_BY_ONE = {
    _aten._foreach_mul.Scalar: torch.mul,
    _aten._foreach_copy_.default: torch.Tensor.copy_,
}


class DeviceTensor(torch.Tensor):
    """A tensor of the second device."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While it lasts, tensors can be made on the second device.

    Attributes:
        down: elements that went from there to the CPU.
        up: elements that went there.
    """

    def __init__(self):
        super().__init__()
        self.down = self.up = 0
        self._patch = mock.patch.object(torch, "tensor", side_effect=_tensor)

    def __enter__(self):
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _COPIES:
            target = args[0] if function is _aten.copy_.default else kwargs.get("device")
            source = args[1] if function is _aten.copy_.default else args[0]
            is_up = isinstance(target, DeviceTensor) or target == DEVICE
            if is_up and not isinstance(source, DeviceTensor):
                self.up += source.numel()
            if isinstance(source, DeviceTensor) and not is_up and target is not None:
                self.down += source.numel()
        return _compute(function, args, kwargs)


def _compute(function, args, kwargs):
    if function in _ONE_BY_ONE:  # which PyTorch does where tensors are of several devices
        others = args[1] if isinstance(args[1], list) else itertools.repeat(args[1])
        return [_ONE_BY_ONE[function](*each) for each in zip(args[0], others, strict=False)]
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    here = [each for each in tensors if isinstance(each, DeviceTensor)]
    others = [each for each in tensors if not isinstance(each, DeviceTensor) and each.dim()]
    if here and others and function not in _COPIES:
        raise AssertionError(f"{function} of tensors of two devices")
    device = kwargs.get("device")
    stays = bool(here) and (function not in _COPIES or device in (None, DEVICE))
    if function is _aten.copy_.default:
        stays = isinstance(args[0], DeviceTensor)
    if device == DEVICE:
        kwargs, stays = {**kwargs, "device": torch.device("cpu")}, True
    elif here and device is not None:
        stays = False
    known = {id(each.inner): each for each in here}

    def unwrap(value):
        return value.inner if isinstance(value, DeviceTensor) else value

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return DeviceTensor(value) if stays and not isinstance(value, DeviceTensor) else value

    if function is _aten._to_copy.default and here and not stays:
        return function(unwrap(args[0]), **kwargs)
    return tree_map(wrap, function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


def _tensor(data, *, device=None, dtype=None, _original=torch.tensor):
    """Stand in for ``torch.tensor``, of which no mode is told."""
    if device == DEVICE:
        return on_device(_original(data, dtype=dtype))
    return _original(data, device=device, dtype=dtype)


def on_device(tensor):
    """Copy a tensor of the CPU there."""
    return DeviceTensor(tensor.detach().clone())


def on_cpu(tensor):
    """Copy a tensor of either to the CPU."""
    return (tensor.inner if isinstance(tensor, DeviceTensor) else tensor).detach().clone()
