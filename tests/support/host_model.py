"""A small model of Megatron's on one rank, and CAME's configurations as programs make them.

Nothing of Megatron is imported before it is needed: see ``host_worker.py``.
"""

import tempfile

import torch
import torch.distributed as dist

LR, DECAY, CLIP = 1e-2, 0.1, 1.0
COMMON = {"lr": LR, "min_lr": 0.0, "weight_decay": DECAY, "clip_grad": CLIP}
GIVEN = {"came_beta2": 0.99, "came_momentum_dtype": "bf16"}


def connect():
    """Megatron's groups of the one rank that there is."""
    from megatron.core import parallel_state

    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def build(*, bf16=False, sharded=True, **more):
    """A GPT of one layer in Megatron's data-parallel wrapper."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        **more,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), 64, 8)
    if bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    return [DistributedDataParallel(config, ddp, model)]


def train(model, optimizer, first=0, steps=3):
    """Take steps; the model's weights after them, bit for bit."""
    from tests.training.recording import digest

    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        for param in model[0].parameters():
            param.main_grad.copy_(torch.randn(param.shape, generator=random))
        optimizer.step()
    return digest(model[0].parameters())


def seen_of(model, optimizer):
    """What tells one way from another."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    config = chain[0].config
    return {
        "optimizer": type(chain[0].optimizer).__name__,
        "wrapper": type(chain[0]).__name__,
        "name": config.optimizer,
        "beta2": config.came.beta2,
        "momentum": config.momentum_dtype,
        "weights": train(model, optimizer),
    }


def plain_config(**settings):
    """As verl and slime make it."""
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(
        **{**COMMON, "optimizer": "came", "use_distributed_optimizer": True, **settings}
    )


def own_config(**settings):
    """As this package's launchers make it."""
    from megatron_came.core.hyperparameters import Hyperparameters
    from megatron_came.megatron.config import CameOptimizerConfig

    given = GIVEN | settings
    return CameOptimizerConfig(
        **COMMON,
        use_distributed_optimizer=True,
        came=Hyperparameters(beta2=given["came_beta2"]),
        momentum_dtype=given["came_momentum_dtype"],
        **{name: value for name, value in settings.items() if not name.startswith("came_")},
    )


def built(config):
    """Build the model, and CAME by the name that is now Megatron's."""
    from megatron.core.optimizer import get_megatron_optimizer

    connect()
    model = build()
    return seen_of(model, get_megatron_optimizer(config, model))
