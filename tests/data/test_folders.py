"""Files and folders: what is read, what is left out and counted, what is an error."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_came.data.corpus import Corpus
from megatron_came.terminal.sentences import CommandError
from tests.support.datasets import ROOT, texts_and_lines

NOBODY = 65534


class TestCorpus:
    def test_folders_are_walked_and_what_is_no_text_is_counted(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "text.txt").write_text("zwei", encoding="utf-8-sig")
        (tmp_path / "a.txt").write_text("eins")
        (tmp_path / "blank.txt").write_text(" \n")
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "picture.bin").write_bytes(b"\x89PNG\0\0")
        (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
        (tmp_path / ".hidden").write_text("never")
        os.mkfifo(tmp_path / "pipe")
        corpus = Corpus.from_paths([tmp_path])
        assert list(corpus) == ["eins", "zwei"]
        faults = {"is empty": 2, "is not text": 1, "is not UTF-8 text": 1, "is a pipe": 1}
        assert corpus.skipped.counts == faults

    def test_a_file_that_cannot_be_read_is_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        locked, fine = tmp_path / "locked.txt", tmp_path / "open.txt"
        locked.write_text("secret")
        fine.write_text("text")
        lock(locked, monkeypatch)
        corpus = Corpus.from_paths([tmp_path])
        assert list(corpus) == ["text"]
        assert corpus.skipped.counts == {"cannot be read (permission denied)": 1}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty: "),
            (b"a\0b", "is not text: "),
            (b"\xff\xfe", "is UTF-16 or UTF-32 text: "),
        ],
    )
    def test_a_file_named_by_itself_must_be_usable(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        file = tmp_path / "notes.txt"
        file.write_bytes(content)
        with pytest.raises(CommandError, match=message) as error:
            list(Corpus.from_paths([file]))
        assert str(error.value).startswith(str(file))

    def test_a_locked_file_named_by_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "notes.txt"
        file.write_text("secret")
        lock(file, monkeypatch)
        with pytest.raises(CommandError, match=r"cannot be read \(permission denied\): "):
            list(Corpus.from_paths([file]))

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(CommandError, match="does not exist"):
            Corpus.from_paths([tmp_path / "none"])

    def test_no_file_in_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CommandError, match="no file"):
            Corpus.from_paths([tmp_path])

    def test_the_python_library_is_a_corpus_of_megabytes(self) -> None:
        corpus = Corpus.python_library()
        assert corpus.size > 4_000_000
        assert not any("site-packages" in path.parts for path in corpus.files)

    def test_json_lines_come_back_as_they_were(self, tmp_path: Path) -> None:
        texts = ["one\ntwo\u2028three", "größer\r\n\t"]
        lines = [
            json.dumps({"text": text}, ensure_ascii=number > 0) for number, text in enumerate(texts)
        ]
        (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
        assert list(Corpus.from_paths([tmp_path / "corpus.jsonl"])) == texts

    @pytest.mark.parametrize(
        "line", ["{", "[]", '{"body": 1}', "3", '{"text": 1}', '{"text": "\\ud800"}']
    )
    def test_a_line_without_text_is_named(self, tmp_path: Path, line: str) -> None:
        file = tmp_path / "corpus.jsonl"
        file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
        with pytest.raises(CommandError, match="line 3, has no JSON object with a text under"):
            list(Corpus.from_paths([file.parent]))


def lock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file unreadable, for root too."""
    really = Path.open

    def open_unless_locked(self: Path, *args: str, **kwargs: str) -> object:
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return really(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_unless_locked)


class TestFolders:
    def test_links_are_followed_and_each_folder_is_read_once(self, tmp_path: Path) -> None:
        corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
        (corpus / "z").mkdir(parents=True)
        (elsewhere / "deeper").mkdir(parents=True)
        (corpus / "a.txt").write_text("a")
        (corpus / "z" / "z.txt").write_text("z")
        (elsewhere / "e.txt").write_text("e")
        (elsewhere / "deeper" / "d.txt").write_text("d")
        (corpus / "b").symlink_to(elsewhere)
        (corpus / "c").symlink_to(elsewhere)  # the same once more
        (elsewhere / "up").symlink_to(corpus)  # in a circle
        (corpus / "z" / "self").symlink_to(".")
        (corpus / "linked.txt").symlink_to(elsewhere / "e.txt")
        (corpus / "lost").symlink_to(tmp_path / "nothing")
        (corpus / "knot").symlink_to("knot")
        texts, lines = texts_and_lines(corpus)
        assert texts == ["a", "e", "e", "d", "z"]
        assert "3, each of which is a folder read under another name" in " ".join(lines)
        assert f"Left out {corpus}/lost, which is a link to nothing." in lines
        assert any(f"{corpus}/knot, which cannot be read (too many levels" in x for x in lines)
        # Named twice, it is read twice: that is how one gives a text more weight.
        assert len(list(Corpus.from_paths([corpus, corpus]))) == 2 * len(texts)

    def test_what_is_no_file_is_counted_and_waits_for_nobody(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "device").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket"))
            texts, lines = texts_and_lines(tmp_path)
        assert texts == ["a"]
        assert sorted(line.rpartition("/")[2] for line in lines) == [
            "device, which is a device.",
            "pipe, which is a pipe.",
            "socket, which is a socket.",
        ]
        for name in ("device", "socket"):
            with pytest.raises(CommandError, match=f"{name} is a {name}: name a text file"):
                Corpus.from_paths([tmp_path / name])

    def test_a_folder_with_nothing_to_read_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "lost").symlink_to(tmp_path / "nothing")
        with pytest.raises(CommandError, match=r"no file in what was named: .* is a link to"):
            Corpus.from_paths([tmp_path])

    def test_permissions(self, tmp_path: Path, model: Path) -> None:
        """Of somebody who is not root, in a process of its own."""
        corpus = tmp_path / "corpus"
        for name in ("open", "closed", "listed"):
            (corpus / name).mkdir(parents=True)
            (corpus / name / "text.txt").write_text(name)
        (corpus / "secret.txt").write_text("secret")
        (tmp_path / "link").symlink_to(corpus / "closed")
        (corpus / "linked").symlink_to(corpus / "closed")
        (corpus / "secret.txt").chmod(0)
        (corpus / "closed").chmod(0)  # can be neither listed nor entered
        (corpus / "listed").chmod(0o444)  # can be listed
        for path in (tmp_path, *tmp_path.parents):
            if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o755)
        code = f"""
import os, pathlib
if os.getuid() == 0:
    import encodings.utf_8_sig, megatron_came.data.corpus
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
from megatron_came.data.corpus import Corpus
from megatron_came.terminal.sentences import CommandError
corpus = Corpus.from_paths([pathlib.Path({str(corpus)!r})])
print([*corpus], corpus.size, *corpus.skipped.lines(), sep="\\n")
for name in ("corpus/closed", "corpus/closed/text.txt", "link", "corpus/secret.txt"):
    try:
        list(Corpus.from_paths([pathlib.Path({str(tmp_path)!r}) / name]))
    except CommandError as error:
        print(str(error).replace({str(tmp_path)!r}, ""))
"""
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
            )
        finally:
            (corpus / "closed").chmod(0o755)
            (corpus / "listed").chmod(0o755)
        assert done.returncode == 0, done.stderr
        texts, _, *lines = done.stdout.splitlines()
        assert texts == "['open']"
        said = lines[0]
        assert said.startswith("Left out 4, each of which cannot be read (permission denied); ")
        assert [line.split(":")[0] for line in lines[1:]] == [
            f"/{name} cannot be read (permission denied)"
            for name in ("corpus/closed", "corpus/closed/text.txt", "link", "corpus/secret.txt")
        ]
