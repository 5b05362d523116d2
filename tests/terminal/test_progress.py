"""How far long work is, on a terminal and in a log file."""

import io
import re

import pytest

from megatron_came.terminal.progress import Progress


class TestProgress:
    def test_plain_lines_where_there_is_no_terminal(self) -> None:
        stream = io.StringIO()
        with Progress("Reading", 100, stream) as progress:
            for step in range(100):
                progress.advance(1, f" ({step + 1})")
        assert stream.getvalue().splitlines() == [
            "Reading:  25% (25)",
            "Reading:  50% (50)",
            "Reading:  75% (75)",
            "Reading: 100% (100)",
        ]

    @pytest.mark.parametrize("columns", [60, 80, 120])
    def test_one_line_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
        with Progress("Reading", 4, stream) as progress:
            progress.advance(3, ", 2 MB/s")
        drawn = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue())
        assert drawn.count("\n") == 1
        last = drawn.replace("\n", "").split("\r")[-1]
        assert re.fullmatch(r"Reading +\S+ +75%, 2 MB/s", last.strip())
        assert columns - 2 <= len(last) <= columns  # all of them are used

    def test_long_work_says_how_long_the_rest_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr("megatron_came.terminal.progress.time.monotonic", lambda: now[0])
        stream = io.StringIO()
        with Progress("Reading", 4, stream) as progress:
            for seconds in (1, 60, 60, 60):
                now[0] += seconds
                progress.advance(1)
        assert stream.getvalue().splitlines() == [
            "Reading:  25%",
            "Reading:  50%, 1 min 1 s left",
            "Reading:  75%, 40 s left",
            "Reading: 100%",
        ]

    def test_nothing_to_do_is_done(self) -> None:
        stream = io.StringIO()
        with Progress("Reading", 0, stream) as progress:
            progress.advance(0)
        assert stream.getvalue() == "Reading: 100%\n"
