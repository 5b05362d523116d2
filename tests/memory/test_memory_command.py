"""``megatron-came memory`` as a command, and reports of ``--came-report-memory``."""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from megatron_came import memory
from megatron_came.core.shard import Shard
from megatron_came.core.state import new_state
from megatron_came.memory import command, measurement, report
from megatron_came.memory.launch_command import LaunchCommand, from_script, from_words
from megatron_came.memory.optimizers import ADAMW, Components
from megatron_came.memory.report import Report
from megatron_came.terminal.sentences import CommandError, require
from tests.support.memory_flags import BF16, DO, EXPERTS, SMALL, pp, tp

ROOT = Path(__file__).parents[2]


def test_flags_behind_torchrun():
    words = "srun env A=1 /bin/torchrun --standalone --nnodes 2 --nproc-per-node 4 -m a.b --x 1"
    found = from_words(words.split())
    assert (found.flags, found.ranks) == (["--x", "1"], 8)
    words = "python -m torch.distributed.run --nproc-per-node=2 launch.py pretrain.py --x 1"
    found = from_words(words.split())
    assert (found.flags, found.ranks) == (["--x", "1"], 2)
    # What the machine alone knows, --gpus says.
    assert from_words(["torchrun", "--nproc-per-node", "gpu", "x.py", "--x", "1"]).ranks is None
    assert from_words(["python", "-u", "x.py", "--x", "1"]).flags == ["--x", "1"]


def test_a_script_is_asked_for_its_command(tmp_path):
    script = tmp_path / "train.sh"
    script.write_text(
        'echo "it\'s a line of its own"\n[[ $DRY_RUN == 1 ]] || exit 1\n'
        "printf '%s \\\\\\n    ' torchrun --nproc-per-node 2 x.py '--name \"a b\"' \"$@\"\n"
    )
    found = from_script(script, ["--more", "2"])
    assert (found.flags, found.ranks) == (["--name", "a b", "--more", "2"], 2)


OTHERS = "export PATH=$PWD/others:$PATH\n"  # as "conda activate" does
IGNORING = {
    "arrays": ("A=(--nproc_per_node 4 --nnodes 2)\ntorchrun ${A[@]} x.py --a 'b c' | tee log", 8),
    "another PATH": (OTHERS + "exec nohup torchrun --nproc-per-node=8 x.py --a 'b c' >log 2>&1", 8),
    "Python": (OTHERS + "python3 -m torch.distributed.run --nproc-per-node 8 x.py --a 'b c'", 8),
    "Python without torchrun": ('srun -J test sh -c "python -u x.py --num-layers 1"', None),
    "job": ("echo 'torchrun --nproc-per-node 8 x.py \"$@\"' >in.sh; sbatch -N1 in.sh --a 'b c'", 8),
    "other programs": ("N=$(python -c 'print(2)')\ntorchrun --nproc-per-node $N x.py --a 'b c'", 2),
    "background": ("(sleep 0.3; torchrun --nproc-per-node 8 x.py --a 'b c') >log 2>&1 &", 8),
    "several": ("torchrun --nproc-per-node 8 x.py --a 'b c'; torchrun x.py --num-layers 9", 8),
    "any value": ("torchrun --nproc-per-node 8 x.py --a $'it\\'s\\n\\tß' '' '$b'", 8),
}


@pytest.mark.parametrize("name", IGNORING)
def test_a_script_that_ignores_dry_run_starts_nothing(name, tmp_path, monkeypatch):
    text, ranks = IGNORING[name]
    monkeypatch.chdir(tmp_path)
    for program in ("torchrun", "python", "python3", "srun", "sbatch"):
        other = tmp_path / "others" / program
        other.parent.mkdir(exist_ok=True)
        other.write_text("#!/bin/sh\ntouch started\n")
        other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    Path("train.sh").write_text(text)
    found = from_script(Path("train.sh"), [])
    flags = ["--num-layers", "1"] if ranks is None else ["--a", "b c"]
    flags = ["--a", "it's\n\tß", "", "$b"] if name == "any value" else flags
    assert found == LaunchCommand(flags, ranks, "x.py")
    assert not Path("started").exists()


# What is predicted are GPT models.
EXAMPLES = [
    path
    for path in sorted(ROOT.glob("examples/*/train_[!s]*.sh"))
    if path.parent.name not in ("bert", "t5")
]


@pytest.mark.parametrize("script", EXAMPLES, ids=str)
def test_the_examples_can_be_predicted(script, capsys):
    assert command.main(["--script", str(script), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    if script.parent.name == "gpt2_medium":
        assert values["parameters"] == 354_871_296


UNTIED = "--untie-embeddings-and-output-weights --no-gradient-accumulation-fusion "
FSDP2 = UNTIED + "--use-torch-fsdp2 --ckpt-format torch_dist "
FSDP = (
    "--use-megatron-fsdp --ckpt-format fsdp_dtensor "
    "--data-parallel-sharding-strategy optim_grads_params "
)
FAILING = {
    "unknown flag": (SMALL + "--gpus 1 --nonsense 3", "unrecognized arguments: --nonsense 3."),
    "bad choice": (SMALL + "--gpus 1 --tokenizer-type Gpt2", "invalid choice: 'Gpt2'"),
    "bad name": (
        SMALL + "--gpus 1 --attention-backend x",
        "--attention-backend: invalid value: 'x'.",
    ),
    "bad list": (SMALL + "--gpus 1 --moe-layer-freq [1", "--moe-layer-freq: invalid value: '[1'."),
    "bad value": (SMALL + "--gpus 1 --num-layers x", "--num-layers: invalid int value: 'x'."),
    "impossible sizes": (SMALL + "--gpus 8 " + tp(3), "world size (8) is not divisible"),
    "uneven experts": (
        SMALL + "--gpus 9 --expert-model-parallel-size 3 --global-batch-size 9 " + EXPERTS,
        "Number of experts should be a multiple",
    ),
    "no gpus": (SMALL, "add --gpus N"),
    "too few gpus": (SMALL + "--gpus 0", "--gpus 0 is not allowed"),
    "no flags": ("--gpus 1", "name the flags of a launch"),
    "no script": ("--script nowhere.sh", "nowhere.sh does not exist"),
    "size": (SMALL + "--gpus 1 --fit 80", "--fit 80 is no size"),
    "no sequence": (SMALL + "--gpus 1 --seq-length 0", "--seq-length 0 is not allowed: give 1"),
    "no words": (SMALL + "--gpus 1 --padded-vocab-size 0", "--padded-vocab-size 0 is not allowed"),
    "no buckets": (SMALL + "--gpus 1 --ddp-num-buckets 0", "--ddp-num-buckets 0 is not allowed"),
    "no latent query": (SMALL + "--gpus 1 --q-lora-rank 0", "--q-lora-rank 0 is not allowed"),
    "no such file": (
        SMALL + "--gpus 1 --heterogeneous-layers-config-path nowhere.json",
        "nowhere.json cannot be read (no such file or directory): name another file.",
    ),
    "no layers": (SMALL + "--gpus 1 --num-layers 0", "--num-layers 0 is not allowed: give 1"),
    "uneven groups": (
        SMALL + "--gpus 1 --group-query-attention --num-query-groups 3",
        "--num-query-groups 3 does not divide --num-attention-heads 4",
    ),
    "both precisions": (SMALL + "--gpus 1 --fp16 --bf16", "assert not args.bf16"),
    "came": (SMALL + "--gpus 1 --optimizer came --came-beta2 2", "--came-beta2 2.0 is not"),
    "fsdp": (SMALL + "--gpus 1 --use-megatron-fsdp", "requires the `fsdp_dtensor` checkpointing"),
    "fsdp instances": (
        SMALL + FSDP + "--gpus 4 --num-distributed-optimizer-instances 2",
        "--use-megatron-fsdp and --num-distributed-optimizer-instances 2: use 1",
    ),
    "fsdp main weights": (
        SMALL + FSDP + "--gpus 1 --megatron-fsdp-main-params-dtype bf16",
        "another --megatron-fsdp-main-params-dtype than fp32: use that",
    ),
    "fsdp double buffer": (
        SMALL + FSDP + "--gpus 1 --fsdp-double-buffer",
        "--use-megatron-fsdp and --fsdp-double-buffer: leave it out",
    ),
    "model": (SMALL + "--gpus 1 --spec local x", "not with --spec"),
    "tokenizer": (
        SMALL + "--gpus 1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model x --vocab-size 0",
        "add --vocab-size N",
    ),
    "machine": ("torchrun --nproc-per-node gpu x.py --num-layers 1", "add --gpus N"),
    "torchrun": ("torchrun --num-layers 1", "torchrun command cannot be read"),
    "unknown optimizer": (SMALL + "--gpus 1 --optimizer soap", "--optimizer soap: give one of c"),
    "fp16 with lion": (SMALL + "--gpus 1 --fp16 --optimizer lion", "refuses --fp16 with --opt"),
    "precise fp32": (
        SMALL + DO + "--gpus 1 --use-precision-aware-optimizer",
        "is predicted with --bf16 or --fp16",
    ),
    "sharded sgd": (SMALL + DO + "--gpus 2 --optimizer sgd", "does not take --optimizer sgd"),
    "bf16 moments": (SMALL + BF16 + DO + "--gpus 2 --exp-avg-dtype bf16", "--exp-avg-dtype goes w"),
    "gradients": (SMALL + "--bf16 --gpus 2 --main-grads-dtype bf16", "--main-grads-dtype goes w"),
    "experts": (SMALL + EXPERTS + tp(2) + "--gpus 2", "with --sequence-parallel alone: add it"),
    "odd sequence": (
        SMALL + tp(4) + "--sequence-parallel --gpus 4 --seq-length 30",
        "cannot cut a sequence of 30 for --tensor-model-parallel-size 4",
    ),
    "virtual stages": (
        SMALL + pp(2) + "--num-layers-per-virtual-pipeline-stage 1 --gpus 2 --global-batch-size 5",
        "5 micro-batches do not fill 2 pipeline stages with virtual ones",
    ),
    "another layout": (
        "--gpus 1 pretrain_bert.py --optimizer muon " + SMALL + DO,
        "not predicted: add --no-use-layer-wise-param-layout",
    ),
    "weights in fp8": (
        "--gpus 2 " + SMALL + DO + "--bf16 --fp8-format hybrid --fp8-param-gather",
        "memory cannot be predicted with --fp8-param-gather: leave it out",
    ),
    "two lengths": (
        SMALL.replace("--num-layers", "--encoder-num-layers") + "--gpus 1 --encoder-seq-length 9",
        "Megatron does not take --encoder-seq-length with the others: leave it out.",
    ),
    "buffers": (
        SMALL + DO + "--gpus 2 --bf16 --reuse-grad-buf-for-mxfp8-param-ag",
        "not a launch of Megatron: Reuse grad buffer only when keeping params in MXFP8.",
    ),
    "printed": (SMALL + "--gpus 1 --checkpoint-activations", ": --checkpoint-activations is no lo"),
    "class": (SMALL + "--gpus 1 --bf16 --fp4-format e2m1", ": --fp4-format requires Transformer"),
    "missing flag": ("--gpus 1 --num-layers 2", "Megatron needs --micro-batch-size: add it"),
    "no tokenizer": (
        SMALL + f"--gpus 1 --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model {__file__}",
        "test_memory_command.py cannot be loaded as a tokenizer",
    ),
    "script is a folder": (f"--script {ROOT}", "is a folder: name the launch script in it"),
    "report is a folder": (f"--compare {ROOT}", f"{ROOT} cannot be used (is a directory): name"),
    "json nowhere": (
        SMALL + "--gpus 1 --json /nowhere/x.json",
        "--json /nowhere/x.json cannot be written (no such file or directory): name another file.",
    ),
    "missing report": (
        "--compare nowhere.json",
        "nowhere.json cannot be used (no such file or directory): name another file.",
    ),
    "flags to compare": ("--compare nowhere.json --num-layers 1", "takes files alone"),
}


@pytest.mark.parametrize("name", FAILING)
def test_bad_input_is_one_sentence(name, capsys):
    words, expected = FAILING[name]
    assert command.main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("megatron-came memory: ")
    assert expected in line


@pytest.mark.parametrize("flag", ["--fit", "--advise", "--json"])
def test_a_value_that_was_never_set_is_refused(flag, capsys):
    """As that of a shell's variable; it was as if the flag had not been given."""
    with contextlib.suppress(SystemExit):
        assert command.main([*SMALL.split(), "--gpus", "1", flag, ""]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "is no size" in printed.err or "'' names no file" in printed.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("exit 3", "status 3: no message"), ("echo hello", "printed no torchrun command")],
)
def test_scripts_that_print_no_command(text, expected, tmp_path):
    script = tmp_path / "x.sh"
    script.write_text(text)
    with pytest.raises(CommandError, match=expected):
        from_script(script, [])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (FSDP2, ("; FSDP2", "KiB of weights and", "KiB of gradients,")),
        (FSDP, ("; Megatron-FSDP, optim_grads_params", "KiB of weights and")),
        (FSDP + "--data-parallel-sharding-strategy optim_grads ", ("largest, 110.44 KiB of grad",)),
        (FSDP + "--data-parallel-sharding-strategy no_shard ", ("; Megatron-FSDP, no_shard",)),
    ],
)
def test_fsdp_is_described(flags, expected, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert command.main([*(SMALL + flags).split(), "--gpus", "4", "--advise", "1MiB"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (*expected, "CAME fp32", "AdamW"):
        assert words in text
    assert ("Nor counted" in text) == ("no_shard" not in flags)
    assert "Muon" not in text


def test_json_plot_and_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    picture, file = tmp_path / "x.png", tmp_path / "x.json"
    words = [*(SMALL + BF16 + pp(2)).split(), "--gpus", "4", "--fit", "1GiB"]
    assert command.main([*words, "--plot", str(picture), "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    values = json.loads(file.read_text())
    assert values["sizes"]["data"] == 2
    stage = values["stages"][values["fullest_stage"]]
    assert stage["bytes"]["CAME fp32"]["static"] < stage["bytes"]["AdamW"]["static"]
    assert f"{stage['parameters']:,} parameters" in text
    assert "micro-batch: the largest --micro-batch-size on 4 GPUs" in text
    assert "CAME bf16" in text
    assert values["fit"]["optimizers"][0]["micro_batch"] == 32


@pytest.mark.parametrize(
    ("flags", "own"),
    [
        (DO + "--optimizer came --came-momentum-dtype int8", "CAME int8 *"),
        ("", "AdamW *"),
        (DO + "--optimizer came --came-main-params remainder", "CAME fp32 + rem. *"),
        (DO + "--optimizer muon", "Muon *"),
    ],
)
def test_what_fits_is_said_of_the_launch_itself(flags, own, capsys):
    words = [*(SMALL + BF16 + flags).split(), "--gpus", "4", "--fit"]
    assert command.main([*words, "0.1MiB"]) == 0
    what_fits, more = capsys.readouterr().out.split("This launch does not fit: it needs ")
    assert "none" in what_fits.split(own)[1].splitlines()[0]
    assert "--advise says what would help" in " ".join(more.split())
    assert command.main([*words, "1GiB"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" not in printed
    assert "1 (data 1)" in printed.split(own)[1].splitlines()[0]


def test_json_alone_goes_to_stdout(capsys):
    assert command.main(["--gpus", "1", "--json", *SMALL.split()]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 1


def test_a_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="pip install matplotlib"):
        require("matplotlib", "--plot")


# Reports.


def _record(rank=0, **changes):
    parts = Components(2000, 4000, 4000, 4000, 40, 160)
    values = {"rank": rank, "stage": 0, "optimizer": "CAME fp32", "parameters": 1000}
    return Report(**{**values, "measured": parts, "predicted": parts, "activations": 7, **changes})


def test_reports_are_compared(tmp_path, capsys):
    more = Components(2000, 4000, 4000, 5404, 40, 160)
    allocator = {"peak_before": 9 * 2**20, "before": 1, "peak_during": 2, "after": 3}
    _record().write(tmp_path)
    _record(1, measured=more, allocator=allocator).write(tmp_path)
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    assert command.main(["--compare", *files]) == 0
    text = capsys.readouterr().out
    assert "rank 1, pipeline stage 0, CAME fp32" in text
    assert "(+10.00%); allocator's peak 9.00 MiB" in text
    assert "(+0.00%)" in text


def test_a_file_that_is_no_report(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert command.main(["--compare", str(tmp_path / "x.json")]) == 2
    assert "is no report of --came-report-memory (it has no 'format')" in capsys.readouterr().err


def test_the_allocator_is_asked_around_the_step(monkeypatch):
    counts = {"now": 100, "peak": 500}

    def reset():
        counts["peak"] = counts["now"]

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: counts["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: counts["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)

    class Optimizer:
        def step(self):
            counts.update(now=110, peak=180)
            return True, 1.0, None

    optimizer = Optimizer()
    on_cuda = [SimpleNamespace(parameters=lambda: [SimpleNamespace(is_cuda=True)])]
    with measurement.watch_step(on_cuda, optimizer) as seen:
        assert optimizer.step() == (True, 1.0, None)
    assert seen == [{"peak_before": 500, "before": 100, "peak_during": 180, "after": 110}]
    assert "step" not in vars(optimizer)
    on_cpu = [torch.nn.Linear(1, 1)]
    with measurement.watch_step(on_cpu, optimizer) as seen:
        optimizer.step()
    assert seen == []


def test_the_command_is_registered(monkeypatch, capsys):
    from megatron_came.tools import cli

    monkeypatch.setattr(sys, "argv", ["megatron-came", "memory", "--gpus", "1"])
    assert cli.main() == 2
    assert "name the flags of a launch" in capsys.readouterr().err


@pytest.mark.parametrize("series", [(0, 16), (0, 18)], ids=str)
def test_releases_whose_models_are_not_laid_out(series, monkeypatch, capsys):
    """The command says so, and a run that reports its memory goes on without a prediction."""
    monkeypatch.setattr(memory, "release", lambda: series)
    assert command.main(["--gpus", "1", *SMALL.split()]) == 2
    said = f"memory is predicted with Megatron 0.19 or newer, and here is 0.{series[1]}: use"
    assert capsys.readouterr().err.startswith(f"megatron-came memory: {said}")
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(report, "of_launch", lambda args: ADAMW)
    monkeypatch.setattr(report, "is_sharded", lambda args: False)
    monkeypatch.setattr(report, "measure", lambda model, optimizer: None)
    made = report._report_of(SimpleNamespace(), [torch.nn.Linear(2, 2)], None, None)
    assert made.predicted is None
    assert str(made.problem).startswith(said)


def test_where_reports_go():
    given = SimpleNamespace(came_memory_dir="x", save="y")
    assert report.folder_of(given) == Path("x")
    given.came_memory_dir = None
    assert report.folder_of(given) == Path("y/came_memory")
    given.save = None
    assert report.folder_of(given) is None


def test_state_is_counted_under_what_it_is():
    param = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
    state = new_state(param, Shard.whole((3, 5)), torch.int8, remainders=True)
    found = {key: measurement.component_of(key) for key in state}
    assert found.pop("exp_avg") == found.pop("exp_avg_scale") == "momentum"
    assert found.pop("remainder") == "main_weights"
    assert len(found) == 4
    assert set(found.values()) == {"second_moment"}
    assert measurement.component_of("exp_avg_sq") == "second_moment"
    assert measurement.component_of("momentum_buffer") == "momentum"
