"""How momentum is kept: one codec for each dtype.

What is kept in fewer bits than the arithmetic takes is rounded stochastically by a step, and to
nearest where it is loaded. A codec is all that the rest of the package knows of a dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_came.core import int8
from megatron_came.core.rounding import to_bf16

MOMENTUM, SCALE = "exp_avg", "exp_avg_scale"

State = Mapping[str, Tensor]
Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Codec:
    """Momentum that is kept as the arithmetic takes it: fp32 and float64."""

    dtype: torch.dtype  # of the state ``exp_avg``
    exact: torch.dtype  # a floating one that holds the values by itself: that of checkpoints
    is_rounded: bool = False  # a step reads copies and rounds them back; else it updates in place
    block: int = 0  # elements that share an fp32 scale and are written together; 0 without scales

    def new(self, like: Tensor) -> dict[str, Tensor]:
        """Return the momentum of a parameter before its first step, with what belongs to it."""
        return {MOMENTUM: torch.zeros(like.shape, dtype=self.dtype, device=like.device)}

    def read(self, state: State, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flat slice for the arithmetic."""
        return state[MOMENTUM].view(-1)[start:stop]

    def at(self, state: State, take: Take, places: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """Return elements of the flat slice; of rounded ones how far their neighbours in bits are.

        ``take`` takes them out of a flat slice, ``places`` returns where in it they are.
        """
        return (take(state[MOMENTUM].view(-1)),)

    def write(self, state: State, start: int, values: Tensor, bits: Tensor | None = None) -> None:
        """Round values, flat and floating, and keep them.

        They begin at ``start`` of the flat slice, with a block, and end with one or with the slice.
        ``bits`` are random ones, of each element, for stochastic rounding; None rounds to nearest.
        """
        state[MOMENTUM].view(-1)[start : start + values.numel()] = values


class _BF16(Codec):
    """Momentum in bf16."""

    def read(self, state: State, start: int, stop: int) -> Tensor:
        return Codec.read(self, state, start, stop).to(torch.float32)

    def at(self, state: State, take: Take, places: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        values = Codec.at(self, state, take, places)[0].to(torch.float32)
        exponent = torch.frexp(values)[1]
        return values, torch.ldexp((values != 0).to(torch.float32), exponent - 8)

    def write(self, state: State, start: int, values: Tensor, bits: Tensor | None = None) -> None:
        rounded = values if bits is None else to_bf16(values, bits)
        Codec.write(self, state, start, rounded)


class _Int8(Codec):
    """Momentum in int8, with scales; see :mod:`megatron_came.core.int8`."""

    def new(self, like: Tensor) -> dict[str, Tensor]:
        scales = torch.zeros(int8.blocks(like.numel()), dtype=torch.float32, device=like.device)
        return {**Codec.new(self, like), SCALE: scales}

    def read(self, state: State, start: int, stop: int) -> Tensor:
        return int8.dequantize(Codec.read(self, state, start, stop), state[SCALE], start)

    def at(self, state: State, take: Take, places: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        spacing = state[SCALE][places() // int8.BLOCK]
        return Codec.at(self, state, take, places)[0] * spacing, spacing

    def write(self, state: State, start: int, values: Tensor, bits: Tensor | None = None) -> None:
        quantized, scale = int8.quantize(values.to(torch.float32), bits)
        Codec.write(self, state, start, quantized)
        first = start // int8.BLOCK
        state[SCALE][first : first + scale.numel()] = scale


# By the name of the flag's value.
CODECS: dict[str, Codec] = {
    "fp32": Codec(torch.float32, torch.float32),
    "bf16": _BF16(torch.bfloat16, torch.bfloat16, is_rounded=True),
    "int8": _Int8(torch.int8, torch.bfloat16, is_rounded=True, block=int8.BLOCK),
}
MOMENTUM_DTYPES = {name: codec.dtype for name, codec in CODECS.items()}
_BY_DTYPE = {codec.dtype: codec for codec in CODECS.values()}


def codec_of(dtype: torch.dtype) -> Codec:
    """Return the codec of a dtype; of others than those of flags, momentum is kept as it is."""
    return _BY_DTYPE.get(dtype) or Codec(dtype, dtype)


def is_complete(state: State) -> bool:
    """Whether momentum is one that CAME writes, and has the scales that it needs."""
    momentum = state[MOMENTUM]
    if codec_of(momentum.dtype).block:
        return SCALE in state and state[SCALE].numel() == int8.blocks(momentum.numel())
    return momentum.is_floating_point()


class RoundedWriter:
    """Rounds momentum that comes box by box, from the first element to the last."""

    def __init__(self, state: State) -> None:
        self._state, self._codec = state, codec_of(state[MOMENTUM].dtype)
        self._written = 0
        # Elements of a block that the next box goes on with, and their bits.
        self._rest: tuple[Tensor, Tensor] | None = None

    def write(self, values: Tensor, bits: Tensor) -> None:
        """Round the next elements, with random bits of each; both flat."""
        if self._rest:
            values, bits = map(torch.cat, zip(self._rest, (values, bits), strict=True))
        stop = self._written + values.numel()
        is_last = stop == self._state[MOMENTUM].numel()
        rest = 0 if is_last or not self._codec.block else stop % self._codec.block
        count = values.numel() - rest
        self._codec.write(self._state, self._written, values[:count], bits[:count])
        self._written += count
        # Copies, since a view would keep the whole box.
        self._rest = (values[count:].clone(), bits[count:].clone()) if rest else None
