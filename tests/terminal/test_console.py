"""Tables and sentences in the columns that there are."""

import errno
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_came.terminal.console import Head, counted, show, table, wrapped
from megatron_came.terminal.sentences import status_of


class TestTables:
    ROWS = (["GiB", "CAME fp32", "CAME int8 + rem.", "AdamW"], ["second moment", "1", "2", "33.3"])

    def test_one_that_fits_is_one_block(self):
        assert table(self.ROWS, 60) == [
            "GiB            CAME fp32  CAME int8 + rem.  AdamW",
            "second moment          1                 2   33.3",
        ]

    def test_heads_are_broken_first(self):
        assert table(self.ROWS, 40) == [
            "                     CAME",
            "                     int8",
            "               CAME     +",
            "GiB            fp32  rem.  AdamW",
            "second moment     1     2   33.3",
        ]

    def test_then_labels(self):
        rows = (self.ROWS[0], ["a label of many more words", "1", "2", "33.3"])
        assert table(rows, 40)[3:] == [
            "GiB                   fp32  rem.  AdamW",
            "a label of many more",
            "  words                  1     2   33.3",
        ]

    def test_then_columns_are_put_below(self):
        assert table(self.ROWS, 20) == [
            "               CAME",
            "GiB            fp32",
            "second moment     1",
            "",
            "               CAME",
            "               int8",
            "                  +",
            "GiB            rem.",
            "second moment     2",
            "",
            "GiB            AdamW",
            "second moment   33.3",
        ]

    def test_heads_are_told_from_cells(self):
        assert [isinstance(line, Head) for line in table(self.ROWS, 40)] == [True] * 4 + [False]

    def test_sentences_keep_their_indentation(self):
        assert wrapped("  a bb ccc dddd", 8) == ["  a bb", "  ccc", "  dddd"]
        assert wrapped("") == [""]


def test_things_are_counted():
    assert [counted(n, "document") for n in (0, 1, 2, 2000)] == [
        "0 documents",
        "1 document",
        "2 documents",
        "2,000 documents",
    ]


class TestNoRoom:
    """For what is printed, or for a file: only the second is the command's to name."""

    @pytest.mark.parametrize("lines", [["x"], ["x" * 79] * 500], ids=["some", "many"])
    def test_printed(self, lines, monkeypatch):
        with suppress(OSError), open("/dev/full", "w") as full:  # closing it fails as well
            monkeypatch.setattr(sys, "stdout", full)
            with pytest.raises(OSError, match="No space left"):
                status_of(lambda: show(lines), "", remedy="name another", place=Path("y"))

    def test_written(self, capsys):
        def work():
            raise OSError(errno.ENOSPC, "No space left on device")

        assert status_of(work, "x: ", remedy="name another", place=Path("y")) == 2
        assert capsys.readouterr().err == (
            "x: y cannot be used (no space left on device): name another.\n"
        )
