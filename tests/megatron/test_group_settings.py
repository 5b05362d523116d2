"""What docs/pytorch.md says of settings by name pattern, in a loop of one's own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch.distributed as dist
from tests.training.buckets_worker import *
from megatron.core.optimizer import ParamKey, get_standard_config_overrides

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
"""


def test_megatron_gives_groups_of_name_patterns_settings_of_their_own():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEGATRON_CAME_CPU": "1"}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    seen = {line for line in done.stdout.splitlines() if line.startswith("SEEN")}
    assert seen == {
        "SEEN 0.999 False 1 [(6, 5)]",
        "SEEN 0.999 False 1 [(7,)]",
        "SEEN 0.95 True 1 [(4, 3)]",
    }, done.stderr[-3000:]
