"""On a CPU, what Megatron uses of Transformer Engine's quantised tensors.

Written after ``transformer_engine/pytorch/quantized_tensor.py`` and ``tensor/utils.py`` of 2.x: a
tensor says that it is in bf16, has no memory, and keeps e4m3 bytes and scales; every operation but
a few works on its dequantised values. :func:`plugged_in` puts it where ``megatron.core.fp8_utils``
looks for Transformer Engine's.
"""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

LARGEST = 448.0  # of e4m3
aten = torch.ops.aten

# Rows and columns that share a scale (None for all of a tensor), and whether it is a power of two.
RECIPES = {
    "delayed": (None, False),
    "tensorwise": (None, False),
    "blockwise": ((16, 16), True),
    "mxfp8": ((1, 32), True),
}
DELAYED_SCALE = 64.0  # which a GPU would derive from steps before


def _matrix(values):
    return values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)


def _spread(scales, shape, block):
    """One number for each element."""
    if block is None:
        return scales.reshape([1] * len(shape)).expand(shape)
    rows, columns = _matrix(torch.empty(shape)).shape
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[:rows, :columns].reshape(shape)


def _largest(values, block):
    """The largest absolute number that each scale is for."""
    if block is None:
        return values.float().abs().max().reshape(1)
    matrix = _matrix(values.float().abs())
    padded = [-(-size // part) * part for size, part in zip(matrix.shape, block, strict=True)]
    whole = torch.zeros(padded)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    parts = whole.reshape(padded[0] // block[0], block[0], padded[1] // block[1], block[1])
    return parts.amax(dim=(1, 3))


def scales_for(recipe, largest):
    _, is_power = RECIPES[recipe]
    if recipe == "delayed":
        return torch.full_like(largest, DELAYED_SCALE)
    scales = torch.where(largest > 0, LARGEST / largest, torch.ones_like(largest))
    return torch.exp2(torch.floor(torch.log2(scales))) if is_power else scales


def encode(recipe, values, scales):
    """The bytes of values."""
    wide = _spread(scales, values.shape, RECIPES[recipe][0])
    scaled = (values.float() * wide).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


class QuantizedTensor(torch.Tensor):
    """As ``Float8Tensor`` and ``Float8BlockwiseQTensor``."""

    @staticmethod
    def __new__(cls, data, scale_inv, recipe, requires_grad=False):
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=torch.bfloat16, device=data.device, requires_grad=requires_grad
        )
        self._data, self._scale_inv, self._recipe = data, scale_inv, recipe
        self._columns = None  # what a GPU keeps of the transpose
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    def _like(self, data):
        other = type(self)(data, self._scale_inv, self._recipe)
        other._columns = self._columns
        return other

    def detach(self):
        return self._like(self._data)

    def dequantize(self, *, dtype=None):
        wide = _spread(self._scale_inv, self._data.shape, RECIPES[self._recipe][0])
        values = self._data.view(torch.float8_e4m3fn).float() * wide
        return values.to(dtype or torch.bfloat16)

    def float(self):
        return self.dequantize(dtype=torch.float32)

    def bfloat16(self):
        return self.dequantize()

    def quantize_(self, values):
        """In place, so that aliases see it."""
        values = values.to(torch.bfloat16)
        scales = scales_for(self._recipe, _largest(values, RECIPES[self._recipe][0]))
        self._data.copy_(encode(self._recipe, values, scales))
        self._scale_inv.copy_(1 / scales)

    def untyped_storage(self):
        return torch.UntypedStorage(0)

    def _get_data(self):
        return super().data

    def _set_data(self, values):
        self.quantize_(values.detach())

    data = property(_get_data, _set_data)

    def __repr__(self, **kwargs):
        return f"{type(self).__name__}({self._recipe}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == aten.detach.default:
            return args[0].detach()
        if func == aten.copy_.default:
            into, values = args[:2]
            values = values.dequantize() if isinstance(values, QuantizedTensor) else values
            if isinstance(into, QuantizedTensor):
                into.quantize_(values)
                return into
            return into.copy_(values)
        whole = isinstance(args[0], QuantizedTensor) and RECIPES[args[0]._recipe][0] is None
        if func in (aten.view.default, aten.slice.Tensor) and whole:
            return args[0]._like(func(args[0]._data, *args[1:], **kwargs))
        if func == aten.split.Tensor and whole:
            return [args[0]._like(each) for each in func(args[0]._data, *args[1:], **kwargs)]
        if func == aten.view.default:
            data = func(args[0]._data, *args[1:])
            if data.shape[-1:] == args[0].shape[-1:]:  # its blocks are the same
                return args[0]._like(data)
            raise NotImplementedError(f"{cls.__name__} class does not support tensor views")
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} would change quantised weights")

        def values_of(each):
            return each.dequantize() if isinstance(each, QuantizedTensor) else each

        return func(*tree_map(values_of, args), **tree_map(values_of, kwargs))


class MXFP8Tensor(QuantizedTensor):
    """Its memory cannot be replaced, so that Megatron gathers bf16 in the gradients' buffer."""


def quantized(values, recipe):
    """Quantise values."""
    values = values.detach().to(torch.bfloat16)
    scales = scales_for(recipe, _largest(values, RECIPES[recipe][0]))
    cls = MXFP8Tensor if recipe == "mxfp8" else QuantizedTensor
    return cls(encode(recipe, values, scales), 1 / scales, recipe)


def parameter(values, recipe):
    """A parameter as layers make them with ``preserve_high_precision_init_val``."""
    param = torch.nn.Parameter(quantized(values, recipe))
    high = values.detach().clone()
    param.get_high_precision_init_val = lambda: high

    def clear():
        del param.get_high_precision_init_val, param.clear_high_precision_init_val

    param.clear_high_precision_init_val = clear
    return param


def _replace_raw_data(tensor, memory):
    if isinstance(tensor, MXFP8Tensor):
        raise NotImplementedError("replace_raw_data for MXFP8Tensor is not supported yet")
    memory.detach().copy_(tensor._data)
    tensor._data = memory


def _cast_shards(params, mains, starts, group, fsdp_shards=None):
    """Each rank quantises its slices, with scales of all ranks' slices."""
    assert fsdp_shards is None
    for param, main, start in zip(params, mains, starts, strict=True):
        block, _ = RECIPES[param._recipe]
        whole = torch.zeros(param.shape, dtype=torch.bfloat16)
        if main is not None:
            whole.view(-1)[start : start + main.numel()] = main.to(torch.bfloat16)
        largest = _largest(whole, block)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scales = scales_for(param._recipe, largest)
        param._scale_inv.copy_(1 / scales)
        param._columns = None
        if main is not None:
            here = slice(start, start + main.numel())
            param._data.view(-1)[here] = encode(param._recipe, whole, scales).view(-1)[here]


def _transpose_all(params):
    """``post_all_gather_processing``."""
    for param in params:
        param._columns = _matrix(param._data).t().contiguous()


def _gather_at_once(whole, piece, group, async_op=False):
    """Not together with others: gloo mixes up what is gathered of bytes and of bf16 together."""
    group._allgather_base(whole, piece).wait()


@contextlib.contextmanager
def plugged_in():
    """Let Megatron find it."""
    from megatron.core import fp8_utils
    from megatron.core.distributed import param_and_grad_buffer

    at_once = {"dist_all_gather_func": _gather_at_once}
    with (
        mock.patch.multiple(param_and_grad_buffer, **at_once),
        mock.patch.multiple(
            fp8_utils,
            HAVE_TE_FP8_TENSOR_CLASS=True,
            FP8_TENSOR_CLASS=QuantizedTensor,
            HAVE_TE_MXFP8TENSOR=True,
            MXFP8Tensor=MXFP8Tensor,
            is_te_min_version=lambda *_, **__: True,
            te_post_all_gather_processing=_transpose_all,
            _modify_underlying_storage_impl=_replace_raw_data,
            _quantize_param_shard_impl=_cast_shards,
            create=True,
        ),
    ):
        yield
