"""Train a small GPT-2 with CAME under accelerate's FSDP2, on counting numbers.

torchrun --nproc-per-node 2 examples/huggingface/fsdp2.py --steps 100 --checkpoint my/checkpoint
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_came import CAME

VOCABULARY, LENGTH = 64, 16

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--steps", type=int, default=100)
arguments.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save to")
args = arguments.parse_args()

accelerator = Accelerator(
    cpu=not torch.cuda.is_available(),
    fsdp_plugin=FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    ),
)
set_seed(0)  # the same weights on all ranks, before they are cut
config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4)
model = GPT2LMHeadModel(config)
optimizer = CAME(model.parameters(), lr=5e-3, betas=(0.9, 0.95, 0.995))
model, optimizer = accelerator.prepare(model, optimizer)
if args.checkpoint and args.checkpoint.exists():
    accelerator.load_state(args.checkpoint)

for step in range(optimizer.param_groups[0]["step"], args.steps):
    torch.manual_seed(1000 * step + accelerator.process_index)  # each rank's own data
    tokens = (torch.randint(VOCABULARY, (16, 1)) + torch.arange(LENGTH)) % VOCABULARY
    tokens = tokens.to(accelerator.device)
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step} loss {loss.item():.4f}", flush=True)

if args.checkpoint:
    accelerator.save_state(args.checkpoint)
accelerator.end_training()
