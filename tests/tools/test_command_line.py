"""``megatron-came``: its help, its flags, its width, and Ctrl-C."""

import argparse
import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megatron_came
from megatron_came import memory
from megatron_came.cpu_megatron.install import REPLACEMENTS as OF_CPU
from megatron_came.megatron.install import REPLACEMENTS as OF_CAME
from megatron_came.tools import cli, flags, inspect

ROOT = Path(__file__).parents[2]
COMMANDS = [command for command in cli._COMMANDS if command != "help"]
FIRST = 'import sys; sys.modules["torch"] = None; sys.argv[0] = "megatron-came"; '


def run(*words, **variables):
    return subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "MEGATRON_CAME_CPU": "1", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


class TestHelp:
    def test_it_needs_no_pytorch(self):
        code = FIRST + "from megatron_came.tools.cli import main; sys.exit(main())"
        of_commands = [[command, "--help"] for command in COMMANDS]
        for words in (["--help"], ["--version"], ["help"], [], *of_commands):
            done = subprocess.run(
                [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stderr) == (0, "")

    def test_the_optimizer_is_imported_when_it_is_asked_for(self):
        assert megatron_came.CAME.__module__ == "megatron_came.optimizer"
        assert {"CAME", "Shard", "__version__"} <= set(dir(megatron_came))
        with pytest.raises(AttributeError, match="no attribute 'NAME'"):
            _ = megatron_came.NAME

    def test_the_module_is_the_command(self):
        version = f"megatron-came {megatron_came.__version__}\n"
        assert run("megatron_came", "--version").stdout == version
        assert run("megatron_came").stdout == run("megatron_came.tools.cli", "--help").stdout

    def test_a_command_is_explained(self, monkeypatch, capsys):
        for command in COMMANDS:
            for words in (["help", command], [command, "--help"]):
                monkeypatch.setattr(sys, "argv", ["megatron-came", *words])
                with pytest.raises(SystemExit) as end:
                    cli.main()
                assert end.value.code == 0
                assert capsys.readouterr().out.startswith(f"usage: megatron-came {command}")

    @pytest.mark.parametrize("words", [["train"], ["help", "train"]])
    def test_there_is_no_such_command(self, words, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["megatron-came", *words])
        assert cli.main() == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("megatron-came: there is no command train.\n")
        assert captured.out == ""

    @pytest.mark.parametrize(
        "words",
        [
            *(["inspect", ""], ["repair", "", "out"], ["patch", ""], ["plot", ""]),
            *(["memory", "--script", ""], ["data", "", "--output-prefix", "out"]),
        ],
        ids=str,
    )
    def test_a_variable_that_was_never_set_is_not_the_current_folder(
        self, words, monkeypatch, capsys
    ):
        monkeypatch.setattr(sys, "argv", ["megatron-came", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert "'' names no file or folder" in capsys.readouterr().err

    @pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
    def test_it_fits(self, command, monkeypatch, capsys):
        for columns in (60, 80, 120):
            monkeypatch.setenv("COLUMNS", str(columns))
            monkeypatch.setattr(sys, "argv", ["megatron-came", *command, "--help"])
            with contextlib.suppress(SystemExit):
                cli.main()
            longest = max(map(len, capsys.readouterr().out.splitlines()))
            assert longest <= max(columns, 80)


class TestOutput:
    """Whoever reads may have gone, or there is no room, or nobody ever listened."""

    CODE = "import sys; from megatron_came.tools import cli; sys.argv[1:] = {words}; "
    CODE += "from megatron_came.terminal import console; {more}; sys.exit(cli.main())"

    def run(self, words, redirection, more="pass", **variables):
        command = [sys.executable, "-c", self.CODE.format(words=words, more=more)]
        return subprocess.run(
            ["bash", "-c", f'"$@" {redirection}', "-", *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        )

    @pytest.mark.parametrize("words", [["help"], ["flags", "--replaced"]], ids=str)
    def test_no_room_or_closed(self, words):
        done = self.run(words, "> /dev/full")
        assert done.returncode == 1
        assert done.stderr.endswith("megatron-came: nothing more can be printed (no space left).\n")
        assert "Traceback" not in done.stderr
        assert self.run(words, ">&- 2>&-").returncode == 0

    def test_letters_that_a_locale_lacks(self, tmp_path):
        name = os.fsdecode("größe".encode() + b"\xff")
        more = "sys.modules['megatron_came.tools.flags'] = type(sys)('flags'); "
        more += f"sys.modules['megatron_came.tools.flags'].main = lambda _: print({name!r}) or 0"
        for encoding in ("ascii", "utf-8"):
            done = self.run(["flags"], "", more, PYTHONIOENCODING=encoding)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.endswith("e\\udcff\n")

    def test_a_folder_that_is_gone(self, tmp_path):
        more = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
        words = ["data", "x", "--output-prefix", "y", "--train-tokenizer", "300"]
        more = f"import os; os.chdir({str(tmp_path)!r}); {more}"
        # As the command, which does not look there for modules; Python 3.13.0 stumbles over that.
        done = self.run(words, "", more, PYTHONSAFEPATH="1")
        assert done.returncode == 1
        assert done.stderr.startswith("megatron-came: the current folder cannot be used (no such")

    def test_half_an_installation(self):
        more = "sys.modules['torch'] = None"
        done = self.run(["inspect", "x"], "", more)
        assert done.returncode == 1
        assert done.stderr.startswith("megatron-came: The package torch")

    @pytest.mark.parametrize(
        ("module", "where", "words"),
        [
            ("checkpoint_files.folder", "find", ["inspect", "x"]),
            ("tools.repair", "print", ["repair", "x", "new"]),
            ("memory.command", "_predict", ["memory", "--gpus", "1", "--num-layers", "1"]),
            ("compare.experiment", "_preset", ["compare", "nano"]),
        ],
    )
    def test_nobody_reads_on(self, module, where, words):
        """It is not the command's files that are wrong."""
        fails = "(_ for _ in ()).throw(BrokenPipeError(32, 'Broken pipe'))"
        more = f"import megatron_came.{module} as one; setattr(one, {where!r}, lambda *_: {fails})"
        more += "; from megatron_came.tools.checkpoints import copying"
        more += "; copying.repair = lambda *_: ['what was lost']"
        done = self.run(words, "", more)
        assert (done.returncode, done.stderr) == (141, "")


class TestMegatronsHelp:
    """Which ends in a stack trace as Megatron ships it: one text has a bare percent sign."""

    def test_it_lists_the_flags_of_came(self, tmp_path):
        script = tmp_path / "pretrain.py"
        script.write_text(
            "from megatron.training.arguments import parse_args\n"
            "parse_args()\n"
            "print('Training starts.')\n"
        )
        for words in (["megatron_came.pretrain_gpt"], ["megatron_came.launch", str(script)]):
            done = run(*words, "--help")
            assert done.returncode == 0
            assert "Traceback" not in done.stderr
            assert "Training starts." not in done.stdout
            listed = set(re.findall(r"^  (--[\w-]+)", done.stdout, re.MULTILINE))
            ours = {action.option_strings[0] for action in flags.came_flags()}
            assert ours <= listed
            assert {"--num-layers", "--lr", "--optimizer"} <= listed

    def test_texts_are_escaped_only_where_they_must_be(self):
        from megatron_came.megatron.arguments import with_flags

        parser = argparse.ArgumentParser(prog="x")
        parser.add_argument("--optimizer", choices=["adam"], help="of %(prog)s: %(choices)s")
        parser.add_argument("--bare", default=3, help="at 50% (or more), %(default)s")
        parser.add_argument("--none")
        parser.add_argument("--hidden", help=argparse.SUPPRESS)
        text = with_flags(lambda parser: parser, parser).format_help()
        assert "of x: adam, came" in text
        assert "at 50% (or more)" in text


class TestFlags:
    def test_all_that_is_replaced_of_megatron_is_listed(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "400")
        assert flags.main(["--replaced"]) == 0
        printed = capsys.readouterr().out.split()
        for row in (*OF_CAME, *OF_CPU, *memory.REPLACEMENTS):
            assert row.target in printed
            assert f"{row.by}:" in printed

    def test_all_of_them_are_listed_with_default_and_meaning(self):
        text = "\n".join(flags.text(1000))
        for action in flags.came_flags():
            name = action.option_strings[0]
            (entry,) = re.findall(rf"^  {name}( .*)?\n      (.+)$", text, re.MULTILINE)
            if action.default is not None and action.nargs != 0:
                assert entry[0].endswith(f"({action.default})")
            assert entry[1].replace("%", "%%")[:20] == action.help[:20]
        readme = (ROOT / "README.md").read_text()
        listed = re.findall(r"^\| `(--came-[\w-]+)` \| (\S+) \|", readme, re.MULTILINE)
        assert listed
        for name, default in listed:
            assert re.search(rf"^  {name} .*\({default}\)$", text, re.MULTILINE)

    def test_variables_are_those_that_are_read(self):
        examples = "".join(path.read_text() for path in (ROOT / "examples").rglob("*.sh"))
        read = set(re.findall(r"\$\{([A-Z_]+):-", examples))
        given_by_others = {name for name in read if name.startswith("SLURM")}
        launches = {name for name, _, _ in flags._LAUNCH}
        assert read - given_by_others - launches == {name for name, _, _ in flags._EXAMPLES}
        package = "".join(path.read_text() for path in (ROOT / "megatron_came").rglob("*.py"))
        ours = set(re.findall(r'"(MEGATRON_CAME_[A-Z_]+|CAME_[A-Z_]+)"', package))
        assert ours <= launches
        assert "MEGATRON_CAME_CPU" in ours

    @pytest.mark.parametrize("columns", [40, 80])
    @pytest.mark.parametrize("command", ["inspect", "verify", "replaced"])
    def test_names_longer_than_a_line_fit(self, command, columns, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", str(columns))
        checkpoint = str(ROOT / "tests" / "support" / "checkpoint-v1")
        if command == "replaced":
            assert flags.main(["--replaced"]) == 0
        else:
            assert inspect.main([checkpoint, *(["--verify"] * (command == "verify"))]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= columns

    def test_a_tensor_is_a_line_in_a_pipe(self, capsys):
        """Where nobody says how many columns there are: grep finds all that is said of it."""
        checkpoint = str(ROOT / "tests" / "support" / "checkpoint-v1")
        assert inspect.main([checkpoint]) == 0
        name = "optimizer.state.exp_avg.decoder.layers.self_attention.linear_qkv.weight"
        (line,) = (each for each in capsys.readouterr().out.splitlines() if name in each)
        assert len(line) > 80
        assert line.endswith(" NaN")

    @pytest.mark.parametrize("columns", [40, 60, 80, 120])
    def test_they_fit(self, columns, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert flags.main([]) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        longest = max(map(len, printed.splitlines()))
        assert columns - 20 < longest <= columns or columns == 120


def on_a_terminal(words, columns, **variables):
    """What a program writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from megatron_came.bench import floors; from megatron_came.tools import cli; "
    )
    code += "floors.seconds_per_parameter = lambda *_: 1e-9; sys.exit(cli.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **environment, **variables},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], 120)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0
    return written.decode().replace("\r\n", "\n")


BENCH = ["bench", "--device", "cpu", "--layers", "1", "--model", "nanogpt-char"]
BENCH += ["--steps", "2", "--only", "came, fused", "adamw, fused"]


@pytest.mark.parametrize("columns", [60, pytest.param(120, marks=pytest.mark.matrix)])
def test_a_terminal_is_filled_and_has_bold_heads(columns):
    written = on_a_terminal(BENCH, columns)
    assert "\x1b[1m" in written
    plain = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", written)
    shown = [line.split("\r")[-1] for line in plain.splitlines()]
    assert max(map(len, shown)) <= columns
    assert "100%" in plain


def test_a_terminal_that_wants_no_colours_gets_none():
    written = on_a_terminal(["flags"], 80, NO_COLOR="1")
    assert "\x1b" not in written
    assert "--came-beta3" in written
    assert "Warning" not in written  # of Megatron's modules, of what is not installed


@pytest.mark.parametrize(
    "words", [["pretrain_gpt", "--mock-data"], ["launch", "train.py"]], ids=str
)
def test_ctrl_c_while_a_launch_imports_is_no_stack_trace(words, tmp_path):
    (tmp_path / "torch.py").write_text("open('ready', 'w').close()\nimport time; time.sleep(60)\n")
    (tmp_path / "train.py").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", f"megatron_came.{words[0]}", *words[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -signal.SIGINT


INTERRUPTED = {
    "bench": ["megatron_came", "bench", "--device", "cpu", "--model", "gpt2-small"],
    "iteration": [
        "megatron_came",
        *BENCH[:3],
        "--iteration",
        "--model",
        "gpt2-small",
        "--steps",
        "50",
    ],
    "memory": ["megatron_came", "memory", "--script", "SLOW"],
    "inspect": ["megatron_came", "inspect", str(ROOT / "tests" / "support" / "checkpoint-v1")],
    "flags": ["megatron_came", "flags"],
    "quickstart": ["megatron_came.quickstart", "--folder", "FOLDER"],
}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("bench", 0.4),
        ("bench", 4),
        ("iteration", 8),
        ("memory", 4),
        ("inspect", 1),
        ("flags", 0.7),
        ("quickstart", 1),
        pytest.param("quickstart", 5, marks=pytest.mark.matrix),
    ],
)
def test_ctrl_c_ends_a_command_in_one_line(name, seconds, tmp_path):
    slow = tmp_path / "slow.sh"
    slow.write_text("sleep 30\n")
    replaced = {"SLOW": str(slow), "FOLDER": str(tmp_path / "quickstart")}
    process = subprocess.Popen(
        [sys.executable, "-m", *(replaced.get(word, word) for word in INTERRUPTED[name])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_CAME_CPU": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    assert process.poll() is None, process.communicate()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)  # to it alone: those that it has started must end as well
    _, written = process.communicate(timeout=30)
    taken = time.monotonic() - start
    assert process.returncode == 130
    said = [line for line in written.splitlines() if "interrupted" in line.lower()]
    assert len(said) == 1
    assert written.splitlines()[-1] == said[0]
    assert "Traceback" not in written
    # Two seconds on a machine that does nothing else.
    assert taken < 6
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() - start < 20:
            os.killpg(process.pid, 0)
            time.sleep(0.1)  # what was killed is there until it is waited for
        pytest.fail("a process is left")
