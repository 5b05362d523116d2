"""Megatron's training loop on a machine without a GPU, and the two launchers."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_came import cpu_megatron, launch
from megatron_came.cpu_megatron import switch
from megatron_came.cpu_megatron.arguments import RULES
from megatron_came.quickstart import command
from megatron_came.rules import refusal
from tests.support.running import run_python
from tests.training import harness

TINY = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 8 --train-iters 4 "
    "--lr 1e-2 --min-lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 63 "
    "--make-vocab-size-divisible-by 16 --log-interval 1 --eval-iters 1 --eval-interval 1000 "
    "--optimizer adam"
)
PLAIN = shlex.split("--attention-dropout 0 --hidden-dropout 0 --use-distributed-optimizer")
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]


def train(ranks: int, *flags: str) -> str:
    """Train the tiny model on so many ranks and return the log."""
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("-m", "megatron_came.pretrain_gpt", *TINY, *flags),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def forked(folder: Path, ranks: int, *flags: str) -> tuple[bool, str]:
    """The same in processes that need not import Megatron; whether one failed, and the log."""
    log = folder / "log"
    failed = harness.fork("megatron_came.pretrain_gpt", ranks, [*TINY, *flags], log)
    return failed, log.read_text()


def losses(log: str) -> dict[int, float]:
    """The training losses by iteration."""
    found = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", log)
    return {int(iteration): float(loss) for iteration, loss in found}


def validation_loss(log: str) -> float:
    """The loss on the validation set, after the last iteration."""
    return float(re.findall(r"on validation set \| lm loss value: (\S+)", log)[-1])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The log of four iterations on one rank, and the checkpoint of the second."""
    folder = tmp_path_factory.mktemp("checkpoint")
    log = train(1, *PLAIN, *RESHARDABLE, "--save", str(folder), "--save-interval", "2")
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return log, folder


def test_adam_learns_and_says_once_where_it_runs(reference: tuple[str, Path]) -> None:
    log, _ = reference
    by_iteration = losses(log)
    assert sorted(by_iteration) == [1, 2, 3, 4]
    assert by_iteration[4] < by_iteration[1] - 0.05
    assert log.count("megatron_came:") == 1
    said = log.partition("megatron_came:")[2].splitlines()[:2]
    for what in ("over gloo", "--transformer-impl local", "--num-workers 0"):
        assert what in " ".join(said)


@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--overlap-grad-reduce --overlap-param-gather",
    ],
)
def test_layouts_resume_alike(reference: tuple[str, Path], layout: str, tmp_path: Path) -> None:
    log, folder = reference
    flags = shlex.join([*TINY, *PLAIN, *RESHARDABLE, "--load", str(folder)])
    harness.run(
        2, [harness.Case("resumed", f"{flags} {layout}", "all-documents", model="")], tmp_path
    )
    resumed = (tmp_path / "log").read_text()
    expected = losses(log)
    # At the second iteration after a start Megatron logs the mean of both.
    assert losses(resumed) == pytest.approx(
        {3: expected[3], 4: (expected[3] + expected[4]) / 2}, rel=2e-6
    )
    assert validation_loss(resumed) == pytest.approx(validation_loss(log), rel=2e-6)


def test_dropout_recomputation_logging_and_background_saving_with_tensor_parallelism(
    tmp_path: Path,
) -> None:
    flags = (
        "--tensor-model-parallel-size 2 --attention-dropout 0.2 --hidden-dropout 0.2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--num-workers 2 --log-throughput --log-params-norm --log-memory-to-tensorboard "
        "--timing-log-level 2 --async-save --use-persistent-ckpt-worker --save-interval 2 "
        f"--save {tmp_path / 'saved'} --data-cache-path {tmp_path / 'cache'}"
    )
    failed, log = forked(tmp_path, 2, *flags.split())
    assert not failed, log[-6000:]
    by_iteration = losses(log)
    assert by_iteration[4] < by_iteration[1]
    assert "CPU RNG state changed" not in log
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert list((tmp_path / "saved" / "iter_0000004").glob("*.distcp"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--fp8-format hybrid",
            "--fp8-format hybrid needs Transformer Engine, whose kernels run on a GPU, and this "
            "run is on the CPU: leave it out.",
        ),
        (
            "--sft",
            "does not support --sft (supervised fine-tuning): use -m megatron_came.launch",
        ),
    ],
    ids=["of a GPU", "of another script"],
)
def test_a_flag_that_cannot_be_had_stops_before_training(
    tmp_path: Path, flags: str, sentence: str
) -> None:
    failed, log = forked(tmp_path, 1, *flags.split())
    assert failed
    assert sentence in log
    assert "Traceback" not in log
    assert not losses(log)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"transformer_impl": "transformer_engine"}, "use --transformer-impl local"),
        ({"distributed_backend": "nccl"}, "use --distributed-backend gloo"),
        (
            {
                "ckpt_fully_parallel_load": True,
                "ckpt_fully_parallel_load_exchange_algo": "gather_rounds",
            },
            "use broadcast",
        ),
        ({"attention_backend": SimpleNamespace(name="flash")}, "--attention-backend flash needs"),
        ({"use_flash_attn": True}, "--use-flash-attn needs"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local needs CUDA graphs"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload needs"),
        ({"profile": True}, "--use-pytorch-profiler"),
        (
            {"window_size": [8, 0], "context_parallel_size": 2},
            "--window-size 8 0 at --context-parallel-size 2 needs an attention kernel for GPUs",
        ),
        (
            {
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "mlp"],
                "add_bias_linear": True,
            },
            "--recompute-modules mlp with biases does not end: add --disable-bias-linear",
        ),
        (
            {
                "num_experts": 4,
                "add_bias_linear": True,
                "expert_model_parallel_size": 1,
                "expert_tensor_parallel_size": None,
                "tensor_model_parallel_size": 1,
            },
            "on the CPU: add --disable-bias-linear",
        ),
    ],
)
def test_refused(arguments: dict[str, object], sentence: str) -> None:
    message = refusal(RULES, argparse.Namespace(**arguments))
    assert message is not None
    assert sentence in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_backend": SimpleNamespace(name="local")},
        {"sequence_parallel": True, "tensor_model_parallel_size": 2},
        {"num_experts": 4, "context_parallel_size": 2},
        {"window_size": [8, 0], "context_parallel_size": 1},
        {
            "skip_train": True,
            "num_experts": 4,
            "add_bias_linear": True,
            "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": 1,
        },
        {"profile": True, "use_pytorch_profiler": True},
        {"context_parallel_size": 1, "cuda_graph_impl": "none"},
    ],
)
def test_not_refused(arguments: dict[str, object]) -> None:
    assert refusal(RULES, argparse.Namespace(**arguments)) is None


@pytest.mark.parametrize(
    ("variable", "gpu", "expected"),
    [
        (None, True, False),
        (None, False, True),
        ("", False, True),
        ("1", True, True),
        ("0", False, False),
    ],
)
def test_wanted(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str | None,
    gpu: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(switch, "_DEVICES", tmp_path)  # without a GPU's
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(switch, "_enabled", False)
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(switch.VARIABLE, variable)
    assert cpu_megatron.wanted() is expected


@pytest.mark.parametrize(
    ("devices", "variables", "message"),
    [
        (("nvidia0", "nvidiactl"), {}, r"this machine has a GPU \(.*/nvidia0\), but PyTorch finds"),
        ((), {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "launch's 16 ranks 8 are here"),
        (("nvidia0",), {"MEGATRON_CAME_CPU": "1"}, None),
        (("nvidia0",), {"CUDA_VISIBLE_DEVICES": ""}, None),
        (("nvidiactl",), {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, None),
    ],
)
def test_a_broken_gpu_is_no_reason_to_train_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    devices: tuple[str, ...],
    variables: dict[str, str],
    message: str | None,
) -> None:
    """Simulated: the devices' files, and a PyTorch that cannot use them."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found 12000). Update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(switch, "_enabled", False)
    monkeypatch.setattr(switch, "_DEVICES", tmp_path)
    for name in (switch.VARIABLE, "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in devices:
        (tmp_path / name).touch()
    if message is None:
        assert cpu_megatron.wanted()
        return
    with pytest.raises(ValueError, match=message):
        cpu_megatron.wanted()
    with pytest.raises(SystemExit) as stopped:
        launch.prepare()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    if torch.version.cuda or torch.version.hip:
        assert (
            "finds none here (The NVIDIA driver on your system is too old (found 12000)):" in said
        )
    assert "set MEGATRON_CAME_CPU=1 for all ranks" in said
    assert command.main([]) == 1  # the quick start
    assert "set MEGATRON_CAME_CPU=1 for all ranks" in capsys.readouterr().err


def test_nonsense_in_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(switch, "_enabled", False)
    monkeypatch.setenv(switch.VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"must be 1 .* 0 .* or unset .*, not 'yes'"):
        cpu_megatron.wanted()
    with pytest.raises(SystemExit) as stopped:
        launch.prepare()
    assert stopped.value.code == 2
    assert "MEGATRON_CAME_CPU must be 1" in capsys.readouterr().err


def test_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(switch, "_enabled", False)
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    before = dict(vars(torch.cuda))
    environment = dict(os.environ)
    assert cpu_megatron.enable() is False
    assert vars(torch.cuda) == before
    assert dict(os.environ) == environment


def test_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "_enabled", False)
    monkeypatch.setenv(switch.VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace())
    with pytest.raises(RuntimeError, match="must run before megatron is imported"):
        cpu_megatron.enable()


def test_stand_ins() -> None:
    # -P: not with this folder first on the path, whose subfolder is named as Megatron is.
    done = run_python("-P", str(Path(__file__).parents[1] / "support" / "cpu_probe.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["enabled"] == [True, True, True]
    assert found["announcement"].count("\n") == 2
    assert found["tensors"] == {
        "devices": ["cpu"],
        "to_dtype": "torch.float64",
        "types": ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.float16"],
        "is_cuda": False,
    }
    device = found["device"]
    assert device["available"]
    assert device["compiled"]
    assert device["elapsed"] > 0
    assert 10**7 < device["allocated"] <= 1.1 * device["peak"]
    assert found["randomness"]["same_device_numbers"]
    assert not found["randomness"]["same_host_state"]
    assert found["randomness"]["continued"]
    assert found["randomness"]["refused"].endswith("add --no-load-rng.")
    assert found["model_parallel_regions"] == {
        "inside_continues": True,
        "outside_untouched": True,
        "complaints": "",
    }
    assert found["parser"] == {
        "unknown": [],
        "defaults_refused": None,
        "defaults": ["local", "unfused"],
        "given": [2, "auto", None],
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name the script to run, such as"),
        (["--lr", "1"], "name the script to run before its flags, not --lr."),
        (["{folder}"], "is a directory: name the script in it."),
        (["{folder}/nothing.py"], "does not exist."),
        (["/dev/null"], "/dev/null is no file."),
    ],
)
def test_launching_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch.main([argument.format(folder=tmp_path) for argument in arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron_came.launch: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_launch_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    launch.main(["--help"])
    assert "usage: torchrun ... -m megatron_came.launch SCRIPT FLAGS..." in capsys.readouterr().out


def test_launch_runs_a_script_with_the_megatron_of_its_checkout(tmp_path: Path) -> None:
    found = importlib.util.find_spec("megatron.core")
    assert found is not None
    assert found.origin is not None
    checkout = tmp_path / "checkout"
    (checkout / "megatron").mkdir(parents=True)
    for package in ("core", "training"):
        installed = Path(found.origin).parent.with_name(package)
        (checkout / "megatron" / package).symlink_to(installed)
    folder = checkout / "examples" / "tiny"
    folder.mkdir(parents=True)
    (folder / "beside.py").write_text("number = 7\n")
    (folder / "pretrain_tiny.py").write_text(
        "import sys\n"
        "from beside import number\n"
        "from megatron.training.arguments import parse_args\n"
        "import megatron.core\n"
        "if __name__ == '__main__':\n"
        "    args = parse_args()\n"
        "    print('RAN', number, args.optimizer, args.transformer_impl, sys.argv[0])\n"
        "    print('FROM', megatron.core.__file__)\n"
    )
    script = str(folder / "pretrain_tiny.py")
    done = run_python("-m", "megatron_came.launch", script, "--optimizer", "came")
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"RAN 7 came local {script}" in done.stdout
    assert f"FROM {checkout}" in done.stdout
    assert "runs with Megatron" not in done.stdout
