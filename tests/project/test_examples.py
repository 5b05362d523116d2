"""The launch scripts in examples/: the commands they make, and what they say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.examples import (
    EXAMPLES,
    FROM_CHECKOUTS,
    GPT2,
    PATH,
    ROOT,
    SCRIPTS,
    Cluster,
    dry_run,
    run,
    write_checkout,
    write_dataset,
)

# Python imports it at its start: for whoever asks, the package is not installed.
WITHOUT_TRANSFORMERS = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "transformers" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""

# Reads command lines and world sizes, and writes what Megatron makes of each.
PARSE = """
import json, os, sys
from megatron_came.launch import prepare
prepare()
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.training.arguments import parse_args, validate_args
parsed = []
for flags, world_size in json.loads(sys.argv[1]):
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world_size)}
    sys.argv[1:] = flags
    args = parse_args()
    validate_args(args)
    args.padded = args.vocab_size and vocab_size_with_padding(args.vocab_size, args)
    parsed.append({key: value for key, value in vars(args).items() if type(value) in
                   (int, float, str, bool)})
print("PARSED" + json.dumps(parsed))
"""


class TestCommands:
    """What DRY_RUN=1 prints."""

    @pytest.fixture(scope="class")
    def parsed(self, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
        """What Megatron makes of each script's command, by script and optimizer."""
        keys = [(script, optimizer) for script in SCRIPTS for optimizer in ("came", "adam")]
        commands = []
        checkout = str(write_checkout(tmp_path_factory.mktemp("checkout")))
        for script, optimizer in keys:
            variables = {"MEGATRON_LM": checkout} if script in FROM_CHECKOUTS else {}
            words = dry_run(script, OPTIMIZER=optimizer, **variables)
            after = words.index("--num-layers")
            world_size = int(words[words.index("--nproc-per-node") + 1])
            commands.append((words[after:], world_size))
        done = subprocess.run(
            [sys.executable, "-c", PARSE, json.dumps(commands)],
            env={**os.environ, "MEGATRON_CAME_CPU": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        found = re.search("^PARSED(.*)$", done.stdout, re.MULTILINE)
        assert found
        return dict(zip(keys, json.loads(found[1]), strict=True))

    def test_all_scripts_are_there(self) -> None:
        assert len(GPT2) == 4
        others = {"llama/train_8gpus.sh", "moe/train_8gpus.sh", *FROM_CHECKOUTS}
        assert set(SCRIPTS) - set(GPT2) == others

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_megatron_takes_them(self, parsed: dict, script: str) -> None:
        came, adam = parsed[script, "came"], parsed[script, "adam"]
        assert (came["optimizer"], adam["optimizer"]) == ("came", "adam")
        # The authors' advice.
        assert 0.5 <= came["lr"] / adam["lr"] <= 0.9
        # Only the optimizer's settings and the folder named after it differ.
        different = {key for key in came if came[key] != adam.get(key)}
        folders = {"save", "load", "tensorboard_dir", "data_cache_path", "tokenizer_model"}
        assert different <= folders | {"optimizer", "lr", "min_lr"} | {
            key for key in came if key.startswith(("came_", "adam_"))
        }
        assert came["bf16"]
        assert came["use_distributed_optimizer"]
        assert came["save"] == came["load"]
        assert came["tensorboard_dir"]
        assert came["lr_warmup_iters"] >= 1000

    @pytest.mark.parametrize("script", GPT2)
    def test_gpt2_medium(self, parsed: dict, script: str) -> None:
        args = parsed[script, "came"]
        sizes = [args[key] for key in ("num_layers", "hidden_size", "num_attention_heads")]
        assert sizes == [24, 1024, 16]
        assert args["seq_length"] == 1024
        assert args["padded"] == 50304
        assert not args["untie_embeddings_and_output_weights"]
        assert args["global_batch_size"] == 64

    def test_bert_large(self, parsed: dict) -> None:
        """The recipe of the authors' script."""
        args = parsed["bert/train_8gpus.sh", "came"]
        sizes = [args[key] for key in ("num_layers", "hidden_size", "num_attention_heads")]
        assert sizes == [24, 1024, 16]
        assert (args["seq_length"], args["global_batch_size"]) == (128, 32768)
        assert (args["lr"], args["lr_decay_style"]) == (2.4e-4, "linear")
        assert (args["train_iters"], args["lr_warmup_iters"]) == (20000, 4000)

    def test_t5(self, parsed: dict) -> None:
        args = parsed["t5/train_8gpus.sh", "came"]
        assert (args["encoder_num_layers"], args["hidden_size"]) == (12, 768)
        assert (args["encoder_seq_length"], args["decoder_seq_length"]) == (512, 128)

    def test_layouts(self, parsed: dict) -> None:
        def layout(script: str) -> tuple[int, ...]:
            args = parsed[script, "came"]
            kinds = ("tensor_model", "pipeline_model", "expert_model")
            return (
                *(args[f"{kind}_parallel_size"] for kind in kinds),
                args["data_parallel_size"],
            )

        assert {script: layout(script) for script in SCRIPTS} == {
            "gpt2_medium/train_1gpu.sh": (1, 1, 1, 1),
            "gpt2_medium/train_8gpus.sh": (1, 1, 1, 8),
            "gpt2_medium/train_tp2_pp2_dp2.sh": (2, 2, 1, 2),
            "gpt2_medium/train_slurm.sh": (1, 1, 1, 8),
            "llama/train_8gpus.sh": (1, 1, 1, 8),
            "moe/train_8gpus.sh": (1, 1, 8, 8),
            "bert/train_8gpus.sh": (1, 1, 1, 8),
            "t5/train_8gpus.sh": (1, 1, 1, 8),
        }

    def test_a_shorter_run_shrinks_the_schedule(self) -> None:
        words = dry_run(GPT2[0], TRAIN_ITERS="1000")
        assert words[words.index("--lr-decay-iters") + 1] == "640"
        assert words[words.index("--lr-warmup-iters") + 1] == "64"

    def test_paths_with_spaces_survive(self, tmp_path: Path) -> None:
        words = dry_run(GPT2[0], "--wandb-project", "a b", OUTPUT=str(tmp_path / "my run"))
        assert words[words.index("--save") + 1] == str(tmp_path / "my run" / "checkpoints")
        assert words[-1] == "a b"

    def test_a_checkout(self, tmp_path: Path) -> None:
        (tmp_path / "pretrain_gpt.py").touch()
        words = dry_run(GPT2[0], MEGATRON_LM=str(tmp_path))
        after = words.index("megatron_came.launch")
        assert words[after + 1] == str(tmp_path / "pretrain_gpt.py")

    @pytest.mark.parametrize(
        ("variables", "flags"),
        [
            ({}, "--tokenizer-type NullTokenizer --vocab-size 50257"),
            (
                {"TOKENIZER_MODEL": "t.model"},
                "--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model t.model",
            ),
            (
                {"TOKENIZER_MODEL": str(ROOT)},
                f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {ROOT}",
            ),
        ],
        ids=["none", "sentencepiece", "huggingface"],
    )
    def test_tokenizers(self, variables: dict[str, str], flags: str) -> None:
        words = " ".join(dry_run(GPT2[0], DATA_PATH="my/text", **variables))
        assert f" --data-path my/text --split 95,5,0 {flags} " in words
        assert "--mock-data" not in words

    def test_what_lies_beside_the_dataset(self, tmp_path: Path) -> None:
        for name in ("text_train.idx", "text_valid.idx", "text.model"):
            (tmp_path / name).touch()
        data = str(tmp_path / "text")
        words = " ".join(dry_run(GPT2[0], DATA_PATH=data))
        assert (
            f" --train-data-path {data}_train --valid-data-path {data}_valid --tokenizer-type"
            f" GPTSentencePieceTokenizer --tokenizer-model {data}.model "
        ) in words
        assert "--split" not in words

    def test_slurm(self, tmp_path: Path) -> None:
        cluster = Cluster(tmp_path, nodes=3)
        # SLURM runs a copy of the script, from elsewhere.
        copy = tmp_path / "slurm_script"
        shutil.copy(EXAMPLES / "gpt2_medium" / "train_slurm.sh", copy)
        words = dry_run(str(copy), path=cluster.path, **cluster.variables)
        assert shlex.join(words).startswith(
            "srun --nodes 3 --ntasks-per-node 1 --cpu-bind none env "
        )
        assert words[words.index("--nnodes") + 1] == "3"
        assert words[words.index("--nproc-per-node") + 1] == "8"
        assert words[words.index("--rdzv-endpoint") + 1] == "localhost:29500"


NUMBERS = [
    "DRY_RUN",
    "SMOKE",
    "TRAIN_ITERS",
    "MICRO_BATCH_SIZE",
    "GLOBAL_BATCH_SIZE",
    "GPUS_PER_NODE",
    "SLURM_GPUS_ON_NODE",
    "SLURM_JOB_NUM_NODES",
    "OMP_NUM_THREADS",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "MEGATRON_CAME_CPU",
]


class TestMessages:
    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"OPTIMIZER": "lion"}, "No learning rate is known for OPTIMIZER=lion: add --lr"),
            ({"DRY_RUN": "yes"}, "DRY_RUN must be 0 or 1, not yes."),
            (
                {"TRAIN_ITERS": "1e5"},
                "TRAIN_ITERS must be a whole number from 1 to 999999999, not 1e5.",
            ),
            ({"MEGATRON_LM": "/none"}, "MEGATRON_LM=/none has no pretrain_gpt.py: name a checkout"),
            (
                {"DATA_PATH": "/none/text", "DRY_RUN": "0", "MEGATRON_CAME_CPU": "1"},
                "DATA_PATH=/none/text names no dataset, as there is no /none/text.idx: make",
            ),
            ({"DRY_RUN": "0", "CUDA_VISIBLE_DEVICES": ""}, "GPUs needed 1, there are 0: take"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_mistakes(self, variables: dict[str, str], message: str) -> None:
        done = run("gpt2_medium/train_1gpu.sh", **{"DRY_RUN": "1", **variables})
        assert done.returncode == 1
        assert f"train_1gpu.sh: {message}" in done.stderr
        assert done.stdout == ""

    def test_without_transformers(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text(WITHOUT_TRANSFORMERS)
        variables = {"DATA_PATH": "text", "VOCAB_FILE": "v", "MERGE_FILE": "m"}
        done = run(GPT2[0], DRY_RUN="1", PYTHONPATH=str(tmp_path), **variables)
        assert done.returncode == 1
        assert "GPT2BPETokenizer needs the package transformers: install it, or" in done.stderr

    @pytest.mark.parametrize("script", ["gpt2_medium/train_slurm.sh", "llama/train_8gpus.sh"])
    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize(
        "value", ["PATH[$(touch {})]", "eight", "-1", "0x8", "08", "1 2", "1e3", "9" * 20]
    )
    def test_numbers_are_checked(self, tmp_path: Path, script: str, name: str, value: str) -> None:
        value = value.format(tmp_path / "marker")
        done = run(script, **{"DRY_RUN": "1", name: value})
        assert not (tmp_path / "marker").exists()
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"{name} must be" in done.stderr
        assert f", not {value}." in done.stderr
        assert done.stdout == ""

    def test_all_numbers_are_among_them(self) -> None:
        """What scripts read with a default, but for words and paths."""
        scripts = "".join(path.read_text() for path in EXAMPLES.rglob("*.sh"))
        read = set(re.findall(r"\$\{([A-Z_]+):?[-}]", scripts))
        words = "OPTIMIZER MEGATRON_LM OUTPUT CHECKPOINTS TENSORBOARD DATA_PATH TOKENIZER_MODEL"
        words += " VOCAB_FILE MERGE_FILE SLURM_SUBMIT_DIR"
        # What the scripts themselves set.
        own = "EVAL_ITERS ENVIRONMENT BASH_SOURCE"
        assert read - {*words.split(), *own.split()} == set(NUMBERS)

    def test_words_are_no_programs(self, tmp_path: Path) -> None:
        evil = f"$(touch {tmp_path / 'marker'});`touch {tmp_path / 'marker'}`"
        for name in ("DATA_PATH", "TOKENIZER_MODEL", "OUTPUT", "CHECKPOINTS", "TENSORBOARD"):
            words = dry_run(GPT2[0], **{"DATA_PATH": "x", name: evil})
            assert any(evil in word for word in words), name
        assert not (tmp_path / "marker").exists()

    def test_a_broken_index(self, tmp_path: Path) -> None:
        (tmp_path / "text.idx").write_text("short")
        done = run(GPT2[0], DRY_RUN="1", DATA_PATH=str(tmp_path / "text"))
        assert done.returncode == 1
        assert "has no header; make one with" in done.stderr

    def test_another_optimizer(self) -> None:
        words = dry_run(GPT2[0], "--lr", "1", "--min-lr=0", OPTIMIZER="lion")
        assert words[words.index("--optimizer") + 1] == "lion"
        assert not [word for word in words if word.startswith(("--came", "--adam"))]

    def test_outside_of_slurm(self) -> None:
        done = run("gpt2_medium/train_slurm.sh")
        assert done.returncode == 1
        assert "start it with sbatch" in done.stderr

    def test_a_try_outside_of_slurm(self) -> None:
        words = dry_run("gpt2_medium/train_slurm.sh", SMOKE="1", MEGATRON_CAME_CPU="1")
        assert "srun" not in words
        assert words[words.index("--nnodes") + 1] == "1"
        assert words[words.index("--nproc-per-node") + 1] == "2"

    def test_made_up_tokens_are_no_secret(self) -> None:
        done = run(GPT2[0], DRY_RUN="1")
        assert 'Make a dataset of your own text with "megatron-came data"' in done.stderr


def test_variables_are_documented() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    scripts = "".join(path.read_text() for path in EXAMPLES.rglob("*.sh"))
    read = set(re.findall(r"\$\{([A-Z_]+):-", scripts))
    elsewhere = {"MASTER_PORT", "OMP_NUM_THREADS", "MEGATRON_CAME_CPU"}
    slurm = {name for name in read if name.startswith("SLURM")}
    assert read - elsewhere - slurm == {
        name
        for line in re.findall(r"^\| (`[A-Z_`, ]+) \|", readme, re.MULTILINE)
        for name in re.findall("[A-Z_]+", line)
    }


def test_few_documents_are_not_split(tmp_path: Path) -> None:
    for documents, flags in ((19, "--split 100,0,0"), (20, "--split 95,5,0")):
        write_dataset(tmp_path / "text", documents)
        words = " ".join(dry_run(GPT2[0], DATA_PATH=str(tmp_path / "text")))
        assert flags in words
        assert ("--eval-iters 0" in words) == (documents < 20)


@pytest.mark.skipif(shutil.which("shellcheck", path=PATH) is None, reason="no shellcheck here")
def test_shellcheck() -> None:
    scripts = [str(path.relative_to(ROOT)) for path in EXAMPLES.glob("*/train_*.sh")]
    done = subprocess.run(
        ["shellcheck", "-x", *scripts],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
