"""Training on slices of tensor-parallel shards, on ranks that are threads."""

from dataclasses import dataclass

import torch

from megatron_came import CAME, Shard
from scripts.cases.simulated_ranks import SimulatedGroup, run_ranks

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut: full shape, TP dimension, DP cuts of each local tensor; if factored."""

    shape: tuple[int, ...]
    tp_dim: int | None
    cuts: tuple[tuple[float, ...], ...]  # for each TP rank, inner cuts as fractions
    factored: bool = True

    def bounds(self, tp_rank: int, numel: int) -> list[int]:
        """Return where each rank's slice begins, and the end."""
        return [0, *sorted(round(cut * numel) for cut in self.cuts[tp_rank]), numel]


def local_part(tensor, layout, tp, tp_rank):
    """Return what tensor parallelism leaves to a rank."""
    return tensor if layout.tp_dim is None else tensor.chunk(tp, dim=layout.tp_dim)[tp_rank]


def train_sharded(
    tp,
    dp,
    tensors,
    starts,
    histories,
    betas,
    kernels,
    device,
    tp_dp=False,
    look=None,
    in_place=False,
    **more,
):
    """Train on simulated ranks; return the reassembled tensors.

    Args:
        tp: tensor-parallel size.
        dp: data-parallel size.
        tensors: a layout of each.
        starts: their initial values.
        histories: their gradients, one a step.
        betas: of CAME.
        kernels: likewise.
        device: of the slices.
        tp_dp: whether the ranks of both are also in one group.
        look: is given each rank, its optimizer and its parameters after the last step.
        in_place: whether gradients stay where they are.
        more: settings of CAME.
    """
    tp_groups = [SimulatedGroup([d * tp + t for t in range(tp)]) for d in range(dp)]
    dp_groups = [SimulatedGroup([d * tp + t for d in range(dp)]) for t in range(tp)]
    everyone = SimulatedGroup(list(range(tp * dp)))

    def program(rank):
        dp_rank, tp_rank = divmod(rank, tp)
        shards, slices = {}, []
        for layout, start in zip(tensors, starts, strict=True):
            local = local_part(start, layout, tp, tp_rank)
            bounds = layout.bounds(tp_rank, local.numel())
            low, high = bounds[dp_rank], bounds[dp_rank + 1]
            param = torch.nn.Parameter(local.reshape(-1)[low:high].clone().to(device))
            shards[param] = Shard(
                shape=tuple(local.shape),
                start=low,
                stop=high,
                tp_dim=layout.tp_dim,
                tp_group=tp_groups[dp_rank],
                dp_group=dp_groups[tp_rank],
                tp_dp_group=everyone if tp_dp else None,
                tp_rank=tp_rank,
                factored=layout.factored,
            )
            slices.append((param, low, high))
        # Parameter groups in another order on every rank, as in a distributed optimizer.
        params = list(shards)[rank % len(shards) :] + list(shards)[: rank % len(shards)]
        names = {param: str(index) for index, param in enumerate(shards)}
        settings = {"betas": betas, "kernels": kernels, "names": names, **SETTINGS, **more}
        optimizer = CAME(params, shards=shards, **settings)
        for step in range(len(histories[0])):
            for (param, low, high), layout, history in zip(slices, tensors, histories, strict=True):
                gradient = local_part(history[step], layout, tp, tp_rank).reshape(-1)[low:high]
                if in_place and step:
                    param.grad.copy_(gradient)
                else:
                    param.grad = gradient.clone().to(device)
            optimizer.step()
        if look is not None:
            look(rank, optimizer, list(shards))
        return [param.detach().cpu() for param, _, _ in slices]

    results = run_ranks(tp * dp, program, [*tp_groups, *dp_groups, everyone])
    whole = []
    for index, (layout, start) in enumerate(zip(tensors, starts, strict=True)):
        parts = []
        for tp_rank in range(tp):
            local = local_part(start, layout, tp, tp_rank)
            flat = torch.cat([results[d * tp + tp_rank][index] for d in range(dp)])
            parts.append(flat.view(local.shape))
        if layout.tp_dim is None:
            assert all(torch.equal(parts[0], part) for part in parts)
        whole.append(parts[0] if layout.tp_dim is None else torch.cat(parts, dim=layout.tp_dim))
    return whole
