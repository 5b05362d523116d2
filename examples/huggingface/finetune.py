"""Fine-tune a Llama on instructions with CAME in the Hugging Face Trainer.

python examples/huggingface/finetune.py --model my/llama --data my/instructions.json --output my/run
torchrun --nproc-per-node 8 examples/huggingface/finetune.py ...

The recipe is that of Stanford Alpaca, with which CAME's authors fine-tuned LLaMA-7B, and so is the
data: a list of {"instruction": ..., "input": ..., "output": ...}. Alpaca's rate for AdamW is 2e-5;
here it is 0.7 times that, as the authors publish none for CAME.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from megatron_came import CAME

IGNORED = -100  # the loss is that of the answer alone

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--model", required=True, help="folder or name of a pre-trained model")
arguments.add_argument("--data", required=True, type=Path, help="instructions as JSON")
arguments.add_argument("--output", required=True, help="folder of checkpoints")
arguments.add_argument("--lr", type=float, default=1.4e-5)
arguments.add_argument("--epochs", type=float, default=3)
arguments.add_argument("--batch", type=int, default=128, help="examples a step, over all GPUs")
arguments.add_argument("--micro-batch", type=int, default=4, help="examples at once on a GPU")
arguments.add_argument("--length", type=int, default=512, help="tokens, of which more are cut off")
args = arguments.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokens_of(example: dict[str, str]) -> dict[str, list[int]]:
    """The prompt, of which nothing is learned, and the answer."""
    given = f"### Input:\n{example['input']}\n\n" if example.get("input") else ""
    prompt = f"### Instruction:\n{example['instruction']}\n\n{given}### Response:\n"
    asked = tokenizer(prompt).input_ids
    answer = tokenizer(example["output"], add_special_tokens=False).input_ids
    answer.append(tokenizer.eos_token_id)
    labels = [IGNORED] * len(asked) + answer
    return {"input_ids": (asked + answer)[: args.length], "labels": labels[: args.length]}


at_once = args.micro_batch * int(os.environ.get("WORLD_SIZE", "1"))
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained(args.model),
    TrainingArguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=max(1, args.batch // at_once),
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # of the run
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=[tokens_of(example) for example in json.loads(args.data.read_text())],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    optimizer_cls_and_kwargs=(CAME, {"lr": args.lr, "betas": (0.9, 0.999, 0.9999)}),
)
trainer.train()
trainer.save_model()
