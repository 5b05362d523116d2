"""What of an optimizer lies on the CPU while the model is on a GPU.

With ``--optimizer-cpu-offload`` some main weights and their momentum lie, and are updated, there.
Which ones, all ranks that hold slices or copies of a parameter must decide alike: they compute its
factors each for itself, and other kernels round otherwise. With
``--rl-offload-optimizer-during-inference`` all lies there for a while.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megatron_came.core.parameter_slice import gradient_of
from megatron_came.core.sums import new_on_host
from megatron_came.kernels.dispatch import choose_on_host
from megatron_came.megatron.sharding import ModelGroups
from megatron_came.optimizer import CAME
from megatron_came.step import Begun
from megatron_came.voice import say_once

_CPU = torch.device("cpu")
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_SUMMED = 1024  # elements, so that the sums take a thousandth of what they are of


def chosen(
    config: Any, chunks: Iterable[Any], params: Iterable[Tensor], groups: ModelGroups
) -> set[Tensor]:
    """Choose the parameters of an optimizer whose main weights are to lie on the CPU.

    Its parameters are all, those of which this rank owns nothing included.
    """
    if not config.optimizer_cpu_offload:
        return set()
    has_copies = groups.embedding is not None and groups.embedding.size() > 1
    own, fraction = set(params), config.optimizer_offload_fraction
    of_chunks = ([param for param in chunk.parameters() if param in own] for chunk in chunks)
    return set().union(*(evenly(each, fraction, has_copies=has_copies) for each in of_chunks))


def evenly(params: Iterable[Tensor], fraction: float, *, has_copies: bool) -> set[Tensor]:
    """Choose parameters of a share of all elements, evenly, so that every rank's slice has some.

    Args:
        params: of one chunk of the model and one optimizer, in the model's order, whole.
        fraction: of their elements, to half a parameter.
        has_copies: whether another pipeline stage holds tied embeddings too. Below a fraction of 1
            they stay where they are: that stage has other parameters before them.
    """
    found, taken, seen = set[Tensor](), 0, 0
    for param in params:
        stays = has_copies and fraction < 1 and getattr(param, "shared_embedding", False)
        seen += param.numel()
        # As soon as half of it is due: the share is right everywhere, to half a parameter.
        if not stays and taken + param.numel() / 2 <= fraction * seen:
            found.add(param)
            taken += param.numel()
    return found


@dataclass(slots=True)
class HostSlice:
    """What travels of a slice whose main weights lie on the CPU."""

    home: torch.device  # of the model
    weight: Tensor  # the slice of the model's own weights, there
    rounded: Tensor | None  # the same on the CPU in the model's dtype, if the main weights' differs
    pins_gradients: bool = True  # whether the gradient's copy is pinned
    gradient: Tensor | None = None  # that copy, made when the first one comes

    @classmethod
    def move(cls, local: Tensor, weight: Tensor, dtype: torch.dtype, config: Any) -> Self:
        """Move main weights to the CPU, in a dtype; they stay the same object.

        They may be the model's own, or another tensor on their memory.
        """
        home, pins, is_own = weight.device, config.pin_cpu_params, dtype == weight.dtype
        kept = new_on_host(local.numel(), dtype, home, pins and is_own)
        local.data = kept.copy_(local.detach())
        rounded = None
        if not is_own and local.numel():
            rounded = new_on_host(local.numel(), weight.dtype, home, pins)
        return cls(home, weight, rounded, config.pin_cpu_grads)

    def bring(self, gradient: Tensor) -> Tensor:
        """Start to copy a gradient to the CPU."""
        if self.gradient is None or self.gradient.dtype != gradient.dtype:
            self.gradient = new_on_host(
                gradient.numel(), gradient.dtype, self.home, self.pins_gradients
            )
        return self.gradient.copy_(gradient, non_blocking=True)

    def send_own(self, local: Tensor) -> None:
        """Copy main weights to the model that are of its dtype; there they would be the same."""
        if self.rounded is None:
            self.send(local)

    def send(self, local: Tensor) -> None:
        """Start to copy the model's weights to it."""
        self.weight.copy_(local if self.rounded is None else self.rounded, non_blocking=True)

    def fetch(self, local: Tensor) -> None:
        """Take the main weights from the model's, where these are of the same dtype."""
        if self.rounded is None:
            local.copy_(self.weight, non_blocking=True)


class OffloadedCAME(CAME):
    """CAME that updates some parameters on the CPU, and the others on the model's device.

    As a step begins it copies the gradients of the former to the CPU, where they stay for all three
    passes, and as it ends the model's weights back. Where these are of the main weights' dtype and
    somebody else has written them, they come down first: who loads weights alone writes the
    model's. Their sums over ranks go to the device and into the buffers of the others: a step has
    as many reductions as without.

    Attributes:
        on_host: what travels, by parameter.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_host: dict[Tensor, HostSlice] = {}
        self._sent: Tensor | None = None  # what the model's weights were when they had been sent

    def keep_on_host(self, slices: Mapping[Tensor, HostSlice]) -> None:
        """Take up which parameters lie on the CPU, where they have been moved to, and say so."""
        self._plan = self._sent = None
        self.on_host = dict(slices)
        self._homes = {local: slice_.home for local, slice_ in slices.items()}
        if _CPU not in self._choices:
            self._choices[_CPU] = choose_on_host(self._wanted_kernels)
        numel = sum(local.numel() for local in slices)
        whole = sum(param.numel() for param in self._params())
        say_once(
            f"--optimizer-cpu-offload: of {whole:,} main weights of this rank {numel:,} lie on the "
            f"CPU with their momentum. {self._choices[_CPU].reason}"
        )

    @property
    def host_tensors(self) -> list[Tensor]:
        """All that it keeps on the CPU."""
        found = [] if self._plan is None else [sums.host for sums in self._plan.buffers]
        for local, slice_ in self.on_host.items():
            found += [local, *self.state[local].values()]
            found += [each for each in (slice_.rounded, slice_.gradient) if each is not None]
        return found

    def set_model_weights(self, weights: Mapping[Tensor, Tensor]) -> None:
        """As CAME's; of what lies on the CPU, the copies there are written."""
        copies = {
            local: each.rounded for local, each in self.on_host.items() if each.rounded is not None
        }
        super().set_model_weights({**weights, **copies})

    def _begin(self) -> Begun:
        bits = self._bits()
        # Before the first step nobody knows whether they were written.
        is_written = bits is not None and (self._sent is None or not torch.equal(bits, self._sent))
        for local, slice_ in self.on_host.items():
            if is_written:
                slice_.fetch(local)
            gradient = gradient_of(local)
            if gradient is not None and gradient is not slice_.gradient:
                local.decoupled_grad = slice_.bring(gradient)  # type: ignore[attr-defined]
        for device in set(self._homes.values()):
            if device.type == "cuda":  # what was copied is read by the CPU
                torch.cuda.current_stream(device).synchronize()
        return super()._begin()

    def _end(self, begun: Begun) -> None:
        super()._end(begun)
        for local, slice_ in self.on_host.items():
            slice_.send(local.detach())
        self._sent = self._bits()

    def _bits(self) -> Tensor | None:
        """Sums of the bits of the model's weights where these are of the main weights' dtype."""
        own = (each.weight for each in self.on_host.values() if each.rounded is None)
        # Those without elements may be of any dtype.
        sums = [each for weight in own if weight.numel() for each in _sums_of_bits(weight)]
        return torch.cat(sums) if sums else None


def _sums_of_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum up the bits of a flat tensor as a matrix, by row and by column: rows may be exchanged."""
    bits = weight.view(_BITS[weight.dtype]).reshape(-1)
    whole = bits.numel() // _SUMMED * _SUMMED
    matrix = bits[:whole].view(-1, _SUMMED)
    return matrix.sum(0), matrix.sum(1), bits[whole:].long()  # torch.cat takes one dtype


def on_host_of(came: CAME) -> dict[Tensor, HostSlice]:
    """What of an optimizer lies on the CPU while the model is elsewhere."""
    return came.on_host if isinstance(came, OffloadedCAME) else {}


class Offloaded:
    """Moves what is the optimizer's alone to the CPU and back.

    Megatron's own moves every parameter of the optimizer, and puts copies in their place: of an
    fp32 model, and with remainders, these are the model's weights, which would stay on the CPU
    during inference and not be updated afterwards.
    """

    optimizer: Any  # CAME
    # Parameters of the model, each with the local tensor that the optimizer updates.
    _pairs: list[tuple[Tensor, Tensor]]

    def offload_to_cpu(self) -> None:
        """Move main weights, momentum and factors to the CPU; weights of the model's stay."""
        self._move(_CPU)
        torch.cuda.empty_cache()

    def restore_from_cpu(self) -> None:
        """Move them back to where the model is."""
        self._move(None)

    def _move(self, to: torch.device | None) -> None:
        on_host = on_host_of(self.optimizer)
        for param, local in self._pairs:
            if local in on_host:
                continue  # it stays there
            device = to or param.device
            if local.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
                local.data = local.data.to(device)
            state = self.optimizer.state[local]
            for key, value in state.items():
                state[key] = value.to(device)
