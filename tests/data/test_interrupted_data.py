"""``megatron-came data`` with workers, and the signals that end it: to all, to one, to none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TEXTS = [path.read_text() for path in sorted(Path(json.__file__).parent.parent.glob("e*/*.py"))]


class Command:
    """One that is at work, with two workers."""

    def __init__(self, folder: Path, model: Path, sigint: signal.Handlers) -> None:
        corpus, self.out = folder / "c.jsonl", folder / "out" / "set"
        # Seconds of work for a command that is to be interrupted, less for one that is to end.
        copies = 4 if sigint == signal.SIG_IGN else 20
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) * copies)
        start = [sys.executable, "-c", "from megatron_came.tools import cli; exit(cli.main())"]
        command = ["data", corpus, "--output-prefix", self.out, "--tokenizer-model", model]
        self.process = subprocess.Popen(
            [*start, *map(str, command), "--workers", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Said, since whoever runs the tests in the background may have it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
        )

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def encodes(self) -> None:
        """Waits until tokens are on the disk, and so both workers at work."""
        tokens = self.out.with_name("set.bin.partial")
        while not (tokens.exists() and tokens.stat().st_size):
            assert self.process.poll() is None
            time.sleep(0.01)

    def ends(self) -> tuple[int, str]:
        """The exit status and what was said, when neither it nor a worker can say any more."""
        _, error = self.process.communicate(timeout=60)
        assert "Traceback" not in error
        return self.process.returncode, error

    def left(self) -> list[str]:
        return sorted(path.name for path in self.out.parent.iterdir())


@pytest.fixture
def command(tmp_path: Path, model: Path, request: pytest.FixtureRequest) -> Iterator[Command]:
    command = Command(tmp_path, model, getattr(request, "param", signal.SIG_DFL))
    try:
        command.encodes()
        yield command
    finally:
        if command.process.poll() is None:
            os.killpg(command.process.pid, signal.SIGKILL)
            command.process.communicate()


def test_control_c(command: Command) -> None:
    workers = command.workers()
    assert len(workers) == 2
    for worker in workers:  # whoever sees the signal first, the command decides
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.2)
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
    status, error = command.ends()
    assert status == 130, error
    assert error.endswith("megatron-came data: Interrupted: nothing was written.\n")
    assert command.left() == []


@pytest.mark.parametrize("command", [signal.SIG_IGN], indirect=True)
def test_control_c_does_not_reach_a_job_in_the_background(command: Command) -> None:
    os.killpg(command.process.pid, signal.SIGINT)
    status, error = command.ends()
    assert status == 0, error
    assert command.left() == ["set.bin", "set.idx"]


def test_no_worker_outlives_the_command(command: Command) -> None:
    command.process.kill()
    # The workers, too, hold its stderr open.
    assert command.ends()[0] == -signal.SIGKILL
