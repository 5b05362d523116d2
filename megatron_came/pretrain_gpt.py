# ruff: noqa: E402  (Megatron is imported after it has been prepared)
"""Pre-train a GPT model with Megatron's training loop, from pip packages alone.

    torchrun ... -m megatron_came.pretrain_gpt FLAGS... --optimizer came

All flags are Megatron's.  megatron-core's wheel carries the training loop but no script that starts
it: this is one, for plain pre-training of GPT models (GPT-2, Llama-like, mixture of experts,
multi-token prediction) on indexed data sets or ``--mock-data``, in any layout.  What it leaves out
it refuses; use :mod:`megatron_came.launch` with the script of a Megatron-LM checkout for that.
"""

import time

_STARTED = time.time()  # before the slow imports: Megatron reports how long the start took

from megatron_came.terminal.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()

from megatron_came.launch import prepare, refusals_in_a_sentence

if __name__ == "__main__":
    prepare(training_loop=True)

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers, print_rank_0, set_startup_timestamps
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_came.megatron.compat.pretraining import (
    Batch,
    build_tokenizer,
    mtp_on_this_rank,
    share_batch,
    train,
)
from megatron_came.rules import Rule
from megatron_came.versions import before

Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]

_INPUTS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
_SPIKE = 10  # --check-for-spiky-loss reports a loss this many times above the largest seen

# What only other scripts do, or only with newer releases.
_ELSEWHERE = "-m megatron_came.launch with the script of a Megatron-LM checkout."
_RULES = (
    # Without these Megatron ends in a TypeError.
    Rule("Megatron needs --lr: add it to the flags.", when=lambda s: s.lr is None),
    Rule(
        "Megatron needs --train-iters: add it to the flags.",
        when=lambda s: s.train_iters is None and s.train_samples is None,
    ),
    Rule(
        "Megatron needs --eval-interval: add it to the flags.",
        when=lambda s: s.eval_interval is None,
    ),
    *(
        Rule(f"pretrain_gpt does not support {flag} ({what}): use {_ELSEWHERE}", flag)
        for flag, what in {
            "--sft": "supervised fine-tuning",
            "--fim-data": "fill in the middle",
            "--logits-load-dir": "distillation",
            "--logits-save-dir": "distillation",
            "--freeze-all-layers": "distillation",
            "--dataloader-inter-document-masking": "packed sequences",
            "--hybrid-context-parallel": "packed sequences",
            "--hybrid-layer-pattern": "layers other than a GPT's",
            "--perform-rl-step": "reinforcement learning",
        }.items()
    ),
    *(
        Rule(
            f"pretrain_gpt supports {flag} from Megatron 0.19 on: use it, or {_ELSEWHERE}",
            flag,
            releases=before("0.19"),
        )
        for flag in (
            "--spec",
            "--heterogeneous-layers-config-path",
            "--experimental-attention-variant",
        )
    ),
)

_straggler_detector = StragglerDetector()


def _predicts_further(vp_stage: int | None) -> bool:
    """Whether this rank's model chunk holds layers of multi-token prediction."""
    return mtp_on_this_rank(core_transformer_config_from_args(get_args()), vp_stage)


def get_batch(data: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None) -> Batch:
    """This rank's part of the next micro-batch: all None in the middle of a pipeline."""
    predicts_further = _predicts_further(vp_stage)
    if not predicts_further and not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(_INPUTS)
    return share_batch(data, _INPUTS, predicts_further=predicts_further)


def _check_loss(loss: torch.Tensor) -> None:
    """Let Megatron's rerun machine judge ``loss``, as the flags ask, before it is averaged."""
    args, machine = get_args(), get_rerun_state_machine()
    # Tolerance: computed again, a loss must be the same to the bit.
    validate = partial(machine.validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for what, found in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            message = f"found {what} in local forward loss calculation"
            validate(rejection_func=found, message=message, fatal=True)
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        validate(rejection_func=is_spike, message="Spiky loss", fatal=False)


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> Loss:
    """Sum the losses of the tokens that count, for which the mask is 1.

    Returns:
        The sum, the number of tokens that count, and both as Megatron logs them.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)  # in fp32, whatever the model is in
    _check_loss(loss)
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def forward_step(
    data: Iterator[dict[str, torch.Tensor]] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[[torch.Tensor], Loss]]:
    """Run ``model`` on the next micro-batch.

    Returns:
        The model's output (or its schedule, for ``--overlap-moe-expert-parallel-comm``) and the
        function that makes a loss of it.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_detector(bdata=True):
        batch = get_batch(data, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    labels = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with _straggler_detector:
        run = model.build_schedule_plan if return_schedule_plan else model
        return run(*inputs, **labels), partial(loss_func, batch["loss_mask"])


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    # Of equal names the flags' values; the others have other names, or are made of several flags.
    same = {f.name: getattr(args, f.name) for f in fields(GPTDatasetConfig) if f.name in args}
    other = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": build_tokenizer(args),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,  # or 0
    }
    return GPTDatasetConfig(**same | other)


def datasets(samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """The data sets for training, validation and test, each of so many samples.

    They are None where the rank, or this model chunk of an interleaved pipeline, reads none.
    """

    def reads_data() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and (
            is_first_or_last_pipeline_stage(vp_stage) or _predicts_further(vp_stage)
        )

    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    built = BlendedMegatronDatasetBuilder(kind, samples, reads_data, _dataset_config(args)).build()
    print_rank_0("> finished creating GPT datasets ...")
    return list(built)


datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron: built on every rank


def embedding_ranks(pipeline: list[int]) -> list[int]:
    """Those ranks of ``pipeline`` that hold a copy of the word embeddings."""
    ranks = {pipeline[0]}
    if len(pipeline) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline[-1])
        ranks.update(get_mtp_ranks(pipeline, core_transformer_config_from_args(args)))
    return sorted(ranks)


def main() -> None:
    """Train as the command line says.

    Raises:
        SystemExit: The command line asks for something that this script leaves out.
    """
    set_startup_timestamps(program_start=_STARTED, main_entry=time.time())
    with refusals_in_a_sentence():
        train(datasets, forward_step, embedding_ranks, _RULES)


if __name__ == "__main__":
    main()
