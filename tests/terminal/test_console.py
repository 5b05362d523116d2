"""Tables and sentences in the columns that there are."""

from megatron_came.terminal.console import Head, table, wrapped


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
