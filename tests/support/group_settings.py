"""Settings by name pattern in a loop of one's own; run by ``tests.training.harness.fork``."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_came.megatron.config import CameOptimizerConfig
from tests.training.buckets_worker import Pile, parts


def main() -> None:
    """Print the groups of a model after a step and a load."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    pile = Pile(config, [((6, 5), ""), ((7,), ""), ((4, 3), "")], torch.float32)
    sharded = {"use_distributed_optimizer": True}
    model = DistributedDataParallel(config, DistributedDataParallelConfig(**sharded), pile)
    config = CameOptimizerConfig(lr=1e-3, **sharded)
    overrides = get_standard_config_overrides(config) | {
        ParamKey(name="*p2"): {"betas": (0.9, 0.95, 0.995), "cautious": True}
    }
    optimizer = get_megatron_optimizer(config, [model], config_overrides=overrides)
    for param in model.parameters():
        param.main_grad.fill_(1.0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            shapes = [part.optimizer.shard_of(param).shape for param in group["params"]]
            print("SEEN", group["betas"][1], group["cautious"], group["step"], shapes)
