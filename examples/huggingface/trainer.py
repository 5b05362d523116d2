"""Train a small GPT-2 with CAME in the Hugging Face Trainer, on counting numbers.

python examples/huggingface/trainer.py --output my/run --steps 100
torchrun --nproc-per-node 2 examples/huggingface/trainer.py --output my/run
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from megatron_came import CAME

VOCABULARY, LENGTH = 64, 16

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--output", required=True, help="folder of checkpoints")
arguments.add_argument("--steps", type=int, default=100)
arguments.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
args = arguments.parse_args()

set_seed(0)
tokens = (torch.randint(VOCABULARY, (1024, 1)) + torch.arange(LENGTH)) % VOCABULARY
trainer = Trainer(
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4)
    ),
    TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,  # of the schedule; 0.5 to 0.9 times AdamW's
        warmup_steps=10,
        logging_steps=10,
        save_steps=args.steps,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    optimizer_cls_and_kwargs=(CAME, {"lr": 5e-3, "betas": (0.9, 0.95, 0.995)}),
)
trainer.train(resume_from_checkpoint=args.resume)
