"""Megatron's flags read by Megatron's own parser and validation, for a run of any size."""

import argparse
import contextlib
import copy
import functools
import io
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_came.megatron.errors import refused_by_megatron
from megatron_came.memory.model_kinds import BERT, GPT, T5, kind_of
from megatron_came.memory.optimizers import has_fsdp
from megatron_came.memory.stand_ins import hopper, replaced
from megatron_came.rules import Rule, Settings, flag_of, name_of, refusal
from megatron_came.terminal.sentences import CommandError, reason_of
from megatron_came.voice import PREFIX

# What Megatron's scripts of these models set.
_DEFAULTS = {kind: {"tokenizer_type": "BertWordPieceLowerCase"} for kind in (BERT, T5)}
# Flags of the precision-aware optimizer.
PRECISE_DTYPES = (
    *("--exp-avg-dtype", "--exp-avg-sq-dtype"),
    *("--main-params-dtype", "--main-grads-dtype"),
)
# What a launch has at least one of, where it is given: Megatron takes 0 of some, and others, which
# only a run would refuse.
_COUNTS = """
    num_layers num_experts encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size
    num_attention_heads kv_channels num_query_groups seq_length encoder_seq_length
    decoder_seq_length max_position_embeddings vocab_size make_vocab_size_divisible_by
    moe_ffn_hidden_size moe_router_topk moe_shared_expert_intermediate_size micro_batch_size
    global_batch_size tensor_model_parallel_size pipeline_model_parallel_size
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
    num_distributed_optimizer_instances recompute_num_layers padded_vocab_size ddp_num_buckets
    q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
"""
_MOST_BUILT = 10_000  # layers or experts, each of which takes a moment
_OPTIMIZERS = ("came", "adam", "sgd", "lion", "muon", "dist_muon")


def _not_predicted(flag: str, instead: str, **more: Any) -> Rule:
    return Rule(f"memory cannot be predicted with {{given}}: {instead}.", flag, **more)


def _not_with_fsdp(flag: str, instead: str, **more: Any) -> Iterator[Rule]:
    for kind in ("--use-torch-fsdp2", "--use-megatron-fsdp"):
        sentence = f"memory cannot be predicted with {kind} and {{given}}: {instead}."
        yield Rule(sentence, flag, when=operator.attrgetter(name_of(kind)), **more)


def _is_by_matrix(args: Settings) -> bool:
    return args.optimizer in _OPTIMIZERS[3:]  # Lion and Muon


def _not_counted(name: str) -> Iterator[Rule]:
    """Of numbers that no run could have; Megatron's validation takes them, or divides by them."""
    least = 0 if name in ("num_experts", "vocab_size") else 1  # 0 is as if not given
    # Others are sizes, of which none comes near that.
    most = _MOST_BUILT if name.endswith(("num_layers", "num_experts")) else 2**31 - 1
    count, refused = operator.attrgetter(name), f"{flag_of(name)} {{at.{name}}} is not allowed"
    few = f"{refused}: give {least} or more."
    yield Rule(few, when=lambda args: count(args) is not None and count(args) < least)
    many = f"{refused}: give {most} at most."
    yield Rule(many, when=lambda args: count(args) is not None and count(args) > most)


# What is laid out otherwise, or refused by Megatron: of arguments as they were typed ...
_TYPED = (
    *(rule for name in _COUNTS.split() for rule in _not_counted(name)),
    Rule(
        "{given} does not divide --num-attention-heads {at.num_attention_heads}: give one that "
        "does.",
        "--num-query-groups",
        when=lambda args: (
            args.group_query_attention and (args.num_attention_heads or 0) % args.num_query_groups
        ),
    ),
    _not_predicted("--yaml-cfg", "give the settings as flags"),
    _not_predicted("--use-checkpoint-args", "give the model's flags"),
    _not_predicted("--tensor-parallel-num-weight-shards", "use --tensor-model-parallel-size"),
    _not_predicted("--moe-single-grouped-weight", "leave it out"),
    _not_predicted("--fp8-param-gather", "leave it out, and weights are bf16"),
    _not_predicted("--optimizer", f"give one of {', '.join(_OPTIMIZERS)}", works=_OPTIMIZERS),
    Rule(
        "memory of {given} is predicted with --optimizer came alone, not with {at.optimizer}: "
        "leave it out.",
        "--optimizer-cpu-offload",
        when=lambda args: args.optimizer != "came",
    ),
    Rule(
        "{given} does not go with T5, which Megatron does not cut into pipeline stages: leave it "
        "out.",
        "--pipeline-model-parallel-size",
        works=(1,),
        when=lambda args: args.model_kind == T5,
    ),
    Rule(
        "Megatron refuses {given} with --optimizer {at.optimizer}: use --bf16.",
        "--fp16",
        when=_is_by_matrix,
    ),
    Rule(
        "how Megatron shards {given} with this script is not predicted: add "
        "--no-use-layer-wise-param-layout.",
        "--optimizer",
        when=lambda args: (
            _is_by_matrix(args)
            and args.model_kind != GPT
            and args.use_distributed_optimizer
            and args.use_layer_wise_param_layout is not False  # older releases have no other
        ),
    ),
    Rule(
        "{given} is predicted with --bf16 or --fp16 and --use-distributed-optimizer, which "
        "Megatron wants: add them.",
        "--use-precision-aware-optimizer",
        when=lambda args: not (args.use_distributed_optimizer and (args.bf16 or args.fp16)),
    ),
)
# ... and of those that Megatron has validated.
_VALIDATED = (
    *_not_with_fsdp("--use-precision-aware-optimizer", "leave it out"),
    *_not_with_fsdp("--fsdp-double-buffer", "leave it out"),
    *_not_with_fsdp("--use-nccl-ub", "leave it out", argument="nccl_ub"),
    *_not_with_fsdp("--num-distributed-optimizer-instances", "use 1", works=(1,)),
    Rule(
        "memory cannot be predicted with another --megatron-fsdp-main-params-dtype than fp32: use "
        "that.",
        when=lambda args: (
            args.use_megatron_fsdp and args.megatron_fsdp_main_params_dtype != torch.float32
        ),
    ),
)


def parse(flags: list[str], ranks: int, script: str = "") -> argparse.Namespace:
    """Read and validate the flags of a launch.

    Args:
        flags: Megatron's, and those of megatron_came.
        ranks: number of ranks of the launch.
        script: the training script, whose name says which model it trains.

    Returns:
        Megatron's arguments, with ``padded_vocab_size`` and ``model_kind``.

    Raises:
        CommandError: Megatron, or megatron_came, refuses them.
    """
    with _alone() as printed:
        try:
            from megatron.training.arguments import validate_args

            args = _parsed(flags, ranks)
            args.model_kind = kind_of(script)
            _refuse(args, _TYPED)
            if has_fsdp(args):  # with which Megatron insists that it is not 1
                os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
            validate_args(args, _DEFAULTS.get(args.model_kind, {}))
            _refuse(args, _VALIDATED)
            _refuse_validated(args)
            _pad_vocabulary(args)
        except CommandError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code is None:  # what is wrong was printed
                error.args = tuple(printed.getvalue().splitlines()[-1:])
            raise CommandError(_sentence(error)) from error
    return args


def _sentence(error: BaseException) -> str:
    if str(error).startswith(PREFIX):
        return " ".join(str(error).removeprefix(PREFIX).split())
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read ({reason_of(error)}): name another file."
    return refused_by_megatron(error)


def _parsed(flags: list[str], ranks: int) -> argparse.Namespace:
    def stop(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        said = " ".join(message.split()).rstrip(".")
        raise CommandError(f"these flags are not a launch of Megatron: {said}.")

    def value(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> Any:
        try:
            return read(parser, action, text)
        except argparse.ArgumentError:
            raise
        except Exception as error:  # a KeyError, say, of what Megatron reads it with
            raise argparse.ArgumentError(action, f"invalid value: {text!r}") from error

    read = argparse.ArgumentParser._get_value
    from megatron.training import arguments

    parser = _parser(arguments.add_megatron_arguments)
    with (
        replaced(sys, {"argv": ["megatron-came memory", *flags]}),
        replaced(argparse.ArgumentParser, {"error": stop, "_get_value": value}),
        replaced(arguments, {"add_megatron_arguments": lambda _: parser}),
    ):
        # Lists that are defaults are the parser's, and validation changes some.
        args: argparse.Namespace = copy.deepcopy(arguments.parse_args())
    args.rank, args.world_size = 0, ranks
    return args


@functools.cache
def _parser(with_flags: Callable[[argparse.ArgumentParser], Any]) -> argparse.ArgumentParser:
    """Give a parser Megatron's flags, for which Megatron reads its sources: half a second."""
    parser: argparse.ArgumentParser = with_flags(argparse.ArgumentParser(allow_abbrev=False))
    return parser


def _refuse(args: argparse.Namespace, rules: Sequence[Rule]) -> None:
    if problem := refusal(rules, args):
        raise CommandError(problem)


def _refuse_validated(args: argparse.Namespace) -> None:
    """Refuse what Megatron's validation lets pass, and its run does not."""
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.optimizer == "sgd" and args.use_distributed_optimizer and not has_fsdp(args):
        raise CommandError(
            "Megatron's distributed optimizer does not take --optimizer sgd: leave "
            "--use-distributed-optimizer out."
        )
    for flag in PRECISE_DTYPES:
        dtype = getattr(args, name_of(flag), None)
        if dtype not in (None, torch.float32) and not args.use_precision_aware_optimizer:
            raise CommandError(
                f"{flag} goes with --use-precision-aware-optimizer alone: leave it out or add that."
            )
    if args.num_experts and tensor > 1 and not args.sequence_parallel:
        raise CommandError(
            f"Megatron trains experts at --tensor-model-parallel-size {tensor} with "
            "--sequence-parallel alone: add it."
        )
    for length in (args.seq_length, args.decoder_seq_length):  # the latter is T5's
        if args.sequence_parallel and (length or 0) // args.context_parallel_size % tensor:
            raise CommandError(
                f"--sequence-parallel cannot cut a sequence of {length} for "
                f"--tensor-model-parallel-size {tensor}: use another length or size."
            )
    count = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    group = args.microbatch_group_size_per_vp_stage or stages
    # What its interleaved schedule asserts.
    if args.virtual_pipeline_model_parallel_size and not (
        stages <= group <= count and count % group not in range(1, stages)
    ):
        raise CommandError(
            f"{count} micro-batches do not fill {stages} pipeline stages with virtual ones: use a "
            f"--global-batch-size that has a multiple of {group}."
        )


def objection(args: argparse.Namespace) -> str:
    """What the transformer's settings object to as Megatron makes them; nothing where they do not.

    The models of a prediction are built without what decides about neither shapes nor bytes.

    Args:
        args: Megatron's, validated.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    args = copy.copy(args)
    # Those are asked for by default, and need Transformer Engine as soon as settings are made.
    args.apply_rope_fusion = args.moe_permute_fusion = False
    with _alone():
        try:
            core_transformer_config_from_args(args)
        except Exception as error:
            return repr(error)
    return ""


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
            raise CommandError(
                f"{named or kind} cannot be loaded as a tokenizer of {kind}: "
                "name another, or give --tokenizer-type NullTokenizer --vocab-size N."
            ) from error
    if args.padded_vocab_size is None and args.vocab_size:
        args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args)
    if args.padded_vocab_size is None:
        raise CommandError(
            "the size of the vocabulary is not known, since the tokenizer "
            f"{named or f'of --tokenizer-type {args.tokenizer_type}'} is not on this machine: add "
            "--vocab-size N."
        )


@contextlib.contextmanager
def _alone() -> Iterator[io.StringIO]:
    """Let Megatron think that it is rank 0 of a run on GPUs; yields what it prints."""
    # Megatron insists on the first for tensor parallelism.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, "RANK": "0"}
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        replaced(os, {"environ": environment}),
        replaced(torch.cuda, hopper()),
    ):
        warnings.simplefilter("ignore")
        yield printed
