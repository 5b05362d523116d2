"""Signals that end a command: one line, a status that says which, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_came.terminal.paths import write_whole

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# Starts a script in a session of its own that leaves a process behind, and then does what it is
# told: Python's own work, or code outside Python that does not look for signals.
CODE = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from megatron_came.terminal.interrupts import half_made, in_one_line

def command():
    script = "(sleep 60 & echo $! >child; true) & wait; sleep 60"
    subprocess.Popen(["bash", "-c", script], start_new_session=True)
    half_made.update([Path("half"), Path("folder")])
    Path("half").touch()
    Path("folder").mkdir()
    Path("folder", "file").touch()
    while not Path("child").exists() or not Path("child").read_text():
        time.sleep(0.01)
    Path("ready").touch()
    if {deaf}:
        signal.pthread_sigmask(signal.SIG_BLOCK, [1, 2, 15])  # as where nothing looks for them
        ctypes.CDLL(None).usleep(60_000_000)
    try:
        time.sleep(60)
    finally:
        time.sleep({cleaning})
        Path("cleaned").touch()
    return 0

sys.exit(in_one_line(command, "ended.", grace={grace}))
"""


def started(
    folder: Path, *, grace: float | None, deaf: bool = False, cleaning: float = 0, ignored: int = 0
) -> subprocess.Popen[str]:
    def prepare() -> None:
        # Said, since whoever runs the tests in the background may have some ignored.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(grace=grace, deaf=deaf, cleaning=cleaning)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    while not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(("grace", "deaf"), [(0.0, False), (0.0, True), (0.3, True), (None, False)])
def test_one_line_and_nothing_left(
    tmp_path: Path, number: signal.Signals, grace: float | None, deaf: bool
) -> None:
    process = started(tmp_path, grace=grace, deaf=deaf)
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    start = time.monotonic()
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "ended.\n"
    assert time.monotonic() - start < 6  # two seconds on a machine that does nothing else
    assert process.returncode == 128 + number
    assert not (tmp_path / "half").exists()
    assert not (tmp_path / "folder").exists()
    for _ in range(200):
        if not is_alive(child):
            break
        time.sleep(0.01)
    assert not is_alive(child)


@pytest.mark.parametrize("more", SIGNALS, ids=lambda number: number.name)
def test_another_one_does_not_end_the_cleaning_up(tmp_path: Path, more: signal.Signals) -> None:
    process = started(tmp_path, grace=None, cleaning=0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(more)
    assert process.communicate(timeout=30)[1] == "ended.\n"
    assert process.returncode == 130
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_what_was_ignored_still_is(tmp_path: Path, number: signal.Signals) -> None:
    """A job in the background ignores Ctrl-C, and one under nohup the end of its terminal."""
    process = started(tmp_path, grace=0.0, ignored=number)
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(next(other for other in SIGNALS if other != number))
    assert process.communicate(timeout=30)[1] == "ended.\n"


class TestWholeFiles:
    def test_a_new_one_or_the_old_one(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        write_whole(file, b"old")
        (tmp_path / "file.partial").mkdir()  # so that nothing can be written
        with pytest.raises(OSError, match="directory"):
            write_whole(file, b"new")
        assert file.read_bytes() == b"old"

    def test_who_may_run_it_stays(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch(mode=0o750)
        write_whole(file, b"new")
        assert file.stat().st_mode & 0o777 == 0o750

    def test_a_link_stays(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("file")
        write_whole(tmp_path / "link", b"1")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == b"1"
        assert sorted(os.listdir(tmp_path)) == ["file", "link"]

    def test_what_is_no_file_is_written_as_it_is(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
            write_whole(tmp_path / "pipe", b"1")
            assert reader.communicate(timeout=30)[0] == b"1"
        assert (tmp_path / "pipe").is_fifo()
