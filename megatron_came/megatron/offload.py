"""An optimizer that leaves a GPU to inference: ``--rl-offload-optimizer-during-inference``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_came.megatron.cpu_offload import on_host_of


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
        self._move(torch.device("cpu"))
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
