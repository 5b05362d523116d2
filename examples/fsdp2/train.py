"""Train a small model with CAME under fully_shard, with checkpoints that any number of ranks loads.

torchrun --nproc-per-node 2 examples/fsdp2/train.py --steps 100 --checkpoint my/checkpoint
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_came import CAME

VOCABULARY, WIDTH = 64, 32

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--steps", type=int, default=100)
arguments.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save to")
args = arguments.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
mesh = init_device_mesh(device, (dist.get_world_size(),))
torch.manual_seed(0)  # the same weights on all ranks, before they are cut
blocks = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True) for _ in range(2)]
model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))
for block in blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model.to(device), mesh=mesh)
optimizer = CAME(model.parameters(), lr=5e-3, betas=(0.9, 0.95, 0.995))

done = 0
if args.checkpoint and args.checkpoint.exists():
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=args.checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    done = optimizer.param_groups[0]["step"]

for step in range(done, args.steps):
    torch.manual_seed(1000 * step + dist.get_rank())  # each rank's own data: counting numbers
    tokens = (torch.randint(VOCABULARY, (16, 1)) + torch.arange(17)) % VOCABULARY
    inputs, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.4f}", flush=True)

if args.checkpoint:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=args.checkpoint)
dist.destroy_process_group()
