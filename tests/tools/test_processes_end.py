"""What a command or a trainer starts ends with it, even if that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_came.memory import launch_command
from megatron_came.memory.launch_command import from_script
from megatron_came.terminal import children
from megatron_came.terminal.sentences import CommandError

ROOT = Path(__file__).parents[2]


def is_alive(pid: int) -> bool:
    """Whether it runs: the dead whom nobody asks after stay in the table of processes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    for _ in range(200):
        if not is_alive(pid):
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("sleep 50 & echo $! >pid; wait", None),  # takes too long
        ("(sleep 50 & echo $! >pid; wait); true", None),
        ("trap '' TERM INT; sleep 50 & echo $! >pid; wait", None),
        ("sleep 50 >/dev/null 2>&1 & echo $! >pid; exit 3", 3),  # leaves one behind
        ("sleep 50 >/dev/null 2>&1 & echo $! >pid; echo torchrun --nproc-per-node 1 x.py --y", 0),
    ],
)
def test_a_launch_script_and_all_that_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_command, "_SECONDS", 0.5)
    (tmp_path / "train.sh").write_text(script)
    if status == 0:
        assert from_script(tmp_path / "train.sh", []).flags == ["--y"]
    else:
        message = "did not end within" if status is None else f"ended with status {status}"
        with pytest.raises(CommandError, match=message):
            from_script(tmp_path / "train.sh", [])
    assert ends(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.matrix)]
)
def test_a_command_that_is_interrupted_meanwhile(tmp_path: Path, signum: signal.Signals) -> None:
    code = (
        "import os, signal, sys\nfrom megatron_came.terminal.children import run_alone\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run_alone(['bash', '-c', 'sleep 50 & echo $! >pid; wait'], environment=os.environ,"
        " seconds=60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(timeout=10)
    assert ends(int((tmp_path / "pid").read_text()))


def test_a_command_that_is_interrupted_as_it_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            started.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(children.subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            children.run_alone(["sleep", "50"], environment=os.environ, seconds=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ends(started[0])


def test_a_training_of_a_command_that_is_killed(tmp_path: Path) -> None:
    """Of torchrun, which ends its ranks when it is asked to end."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text("#!/bin/sh\ntrap 'echo >asked; exit' TERM\necho $$ >pid\nsleep 50 & wait\n")
    torchrun.chmod(0o700)
    code = (
        "import os, sys\nfrom megatron_came.training_log import follow\n"
        "sys.executable = './torchrun'\n"
        "follow([], ranks=1, port=None, environment=os.environ, log=sys.stdout, advance=print)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert ends(int((tmp_path / "pid").read_text()))
    assert (tmp_path / "asked").exists()


def test_a_launch_script_hears_signals() -> None:
    """Such as that of ``timeout`` within it."""
    asked = ["grep", "SigBlk", "/proc/self/status"]
    done = children.run_alone(asked, environment=os.environ, seconds=60)
    blocked = int(done.stdout.split()[1], 16)
    assert not blocked & (1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1)


_TRAINER = """
import multiprocessing, os, sys, time
from pathlib import Path
import torch
if __name__ == "__mp_main__":
    raise RuntimeError("the queue's process runs the script")
if __name__ == "__main__":
    from megatron_came import cpu_megatron
    from megatron_came.megatron import install
    os.environ["MEGATRON_CAME_CPU"] = "1"
    cpu_megatron.enable()
    install()
    install()
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
    how, ending = sys.argv[1:]
    names = ("get_write_results_queue", "_get_write_results_queue")
    queue_of = next(vars(filesystem_async)[n] for n in names if n in vars(filesystem_async))
    queue = queue_of(how)
    assert queue is queue_of(how)
    queue.put(torch.float32)
    assert queue.get_nowait() == torch.float32
    (pid,) = [child.pid for child in multiprocessing.active_children()]
    assert how == "fork" or "torch" not in Path(f"/proc/{pid}/maps").read_text()
    worker = async_utils.PersistentAsyncCaller._get_process(0, how)
    print("pids", worker.pid, pid, flush=True)
    if ending == "exit":
        os._exit(1)
    if ending == "error":
        raise RuntimeError
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("how", "ending"),
    [
        ("spawn", "kill"),
        pytest.param("fork", "kill", marks=pytest.mark.matrix),
        pytest.param("fork", "exit", marks=pytest.mark.matrix),
        pytest.param("fork", "error", marks=pytest.mark.matrix),
        pytest.param("fork", "term", marks=pytest.mark.matrix),
        pytest.param("spawn", "exit", marks=pytest.mark.matrix),
    ],
)
def test_workers_for_checkpoints(tmp_path: Path, how: str, ending: str) -> None:
    (tmp_path / "trainer.py").write_text(_TRAINER)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(tmp_path / "trainer.py"), how, ending],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        pids: list[int] = []
        while not pids:
            line = process.stdout.readline()
            assert line
            pids = [int(pid) for pid in line.split()[1:]] if line.startswith("pids") else []
        assert len(pids) == 2
        if ending in ("kill", "term"):
            assert all(is_alive(pid) for pid in pids)
            process.send_signal(signal.SIGKILL if ending == "kill" else signal.SIGTERM)
        assert process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert [ends(pid) for pid in pids] == [True, True]


def test_a_parent_that_is_dead_already() -> None:
    child = os.fork()
    if not child:
        children.end_with_parent(os.getpid())  # no parent of this one
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
