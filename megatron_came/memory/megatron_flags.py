"""Megatron's flags read by Megatron's own parser and validation, for a run of any size."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from megatron_came.memory import fsdp
from megatron_came.memory.launch_command import LaunchError, words_of
from megatron_came.memory.model_kinds import BERT, GPT, T5, kind_of
from megatron_came.memory.optimizers import has_fsdp
from megatron_came.memory.stand_ins import hopper, replaced
from megatron_came.voice import PREFIX

# What Megatron's scripts of these models set.
_DEFAULTS = {kind: {"tokenizer_type": "BertWordPieceLowerCase"} for kind in (BERT, T5)}
_TENSOR = "use --tensor-model-parallel-size"
_OPTIMIZERS = ("came", "adam", "sgd", "lion", "muon", "dist_muon")


def parse(flags: list[str], ranks: int, script: str = "") -> argparse.Namespace:
    """Read and validate the flags of a launch.

    Args:
        flags: Megatron's, and those of megatron_came.
        ranks: number of ranks of the launch.
        script: the training script, whose name says which model it trains.

    Returns:
        Megatron's arguments, with ``padded_vocab_size`` and ``model_kind``.

    Raises:
        LaunchError: Megatron, or megatron_came, refuses them.
    """
    with _alone():
        try:
            from megatron.training.arguments import validate_args

            args = _parsed(flags, ranks)
            args.model_kind = kind_of(script)
            _refuse(args)
            if has_fsdp(args):  # with which Megatron insists that it is not 1
                os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
            validate_args(args, _DEFAULTS.get(args.model_kind, {}))
            if has_fsdp(args):
                fsdp.refuse(args)
            _pad_vocabulary(args)
        except LaunchError:
            raise
        except (Exception, SystemExit) as error:
            raise LaunchError(_sentence(error)) from error
    return args


def _sentence(error: BaseException) -> str:
    if str(error).startswith(PREFIX):
        return " ".join(str(error).removeprefix(PREFIX).split())
    said = words_of(error)
    if not said:  # a bare assertion: its source says what should hold
        frames = traceback.extract_tb(error.__traceback__)
        line = frames[-1].line if frames else ""
        if missing := re.match(r"assert args\.(\w+) is not None", line or ""):
            return f"Megatron needs --{missing[1].replace('_', '-')}: add it to the flags."
        said = f"Megatron stops at {line!r}" if line else "Megatron stops without a word"
    return f"these flags are not a launch of Megatron: {said}."


def _parsed(flags: list[str], ranks: int) -> argparse.Namespace:
    def stop(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise LaunchError(_sentence(ValueError(message)))

    with (
        replaced(sys, {"argv": ["megatron-came memory", *flags]}),
        replaced(argparse.ArgumentParser, {"error": stop}),
    ):
        from megatron.training import arguments

        args: argparse.Namespace = arguments.parse_args()
    args.rank, args.world_size = 0, ranks
    return args


def _refuse(args: argparse.Namespace) -> None:
    """Refuse what is not laid out as this package lays it out."""
    for name, flag, instead in (
        ("yaml_cfg", "--yaml-cfg", "give the settings as flags"),
        ("use_checkpoint_args", "--use-checkpoint-args", "give the model's flags"),
        ("tensor_parallel_num_weight_shards", "--tensor-parallel-num-weight-shards", _TENSOR),
        ("moe_single_grouped_weight", "--moe-single-grouped-weight", "leave it out"),
        ("fp8_param_gather", "--fp8-param-gather", "leave it out, and weights are bf16"),
    ):
        if getattr(args, name, None):
            raise LaunchError(f"memory cannot be predicted with {flag}: {instead}.")
    if args.optimizer_cpu_offload and args.optimizer != "came":
        raise LaunchError(
            f"memory of --optimizer-cpu-offload is predicted with --optimizer came alone, not with "
            f"{args.optimizer}: leave it out."
        )
    if args.model_kind == T5 and args.pipeline_model_parallel_size > 1:
        raise LaunchError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} does not go with "
            "T5, which Megatron does not cut into pipeline stages: leave it out."
        )
    if args.optimizer not in _OPTIMIZERS:
        raise LaunchError(
            f"memory cannot be predicted with --optimizer {args.optimizer}: give one of "
            f"{', '.join(_OPTIMIZERS)}."
        )
    if args.optimizer in _OPTIMIZERS[3:]:
        if args.fp16:
            raise LaunchError(
                f"Megatron refuses --fp16 with --optimizer {args.optimizer}: use --bf16."
            )
        has_layout = getattr(args, "use_layer_wise_param_layout", True)
        if args.model_kind != GPT and args.use_distributed_optimizer and has_layout:
            raise LaunchError(
                f"how Megatron shards --optimizer {args.optimizer} with this script is not "
                "predicted: add --no-use-layer-wise-param-layout."
            )
    precise = getattr(args, "use_precision_aware_optimizer", False)
    if precise and not (args.use_distributed_optimizer and (args.bf16 or args.fp16)):
        raise LaunchError(
            "--use-precision-aware-optimizer is predicted with --bf16 or --fp16 and "
            "--use-distributed-optimizer, which Megatron wants: add them."
        )


def _pad_vocabulary(args: argparse.Namespace) -> None:
    """Set ``padded_vocab_size``, from the tokenizer if its files are here."""
    from megatron.core.tokenizers.utils.build_tokenizer import (
        build_tokenizer,
        vocab_size_with_padding,
    )

    if args.padded_vocab_size is not None:
        return
    files = [file for file in (args.tokenizer_model, args.vocab_file) if file]
    named = " and ".join(files)
    here = all(Path(file).exists() for file in files)
    if (files and here) or args.tokenizer_type == "NullTokenizer":
        try:
            build_tokenizer(args)
        except Exception as error:
            kind = f"--tokenizer-type {args.tokenizer_type}"
            raise LaunchError(
                f"{named or kind} cannot be loaded as a tokenizer of {kind}: "
                "name another, or give --tokenizer-type NullTokenizer --vocab-size N."
            ) from error
    if args.padded_vocab_size is None and args.vocab_size:
        args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args)
    if args.padded_vocab_size is None:
        raise LaunchError(
            "the size of the vocabulary is not known, since the tokenizer "
            f"{named or f'of --tokenizer-type {args.tokenizer_type}'} is not on this machine: add "
            "--vocab-size N."
        )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let Megatron think that it is rank 0 of a run on GPUs, and keep what it says to itself."""
    import torch

    # Megatron insists on the first for tensor parallelism.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, "RANK": "0"}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        replaced(os, {"environ": environment}),
        replaced(torch.cuda, hopper()),
    ):
        warnings.simplefilter("ignore")
        yield
