"""Variables of make reach the programs as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


def words_of(tmp_path: Path, *variables: str) -> list[str]:
    """What ``make quickstart`` gives to Python."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["make", "--silent", "-o", "venv", "quickstart", f"BIN={tmp_path}", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_options(tmp_path):
    assert words_of(tmp_path) == ["-m", "megatron_came.quickstart"]
    words = words_of(tmp_path, "TEXT=a.txt b.txt", "RANKS=2", "PORT=1", "ITERATIONS=3")[2:]
    assert words == "--text a.txt b.txt --ranks 2 --port 1 --iterations 3".split()  # noqa: SIM905


@pytest.mark.parametrize("name", ["TEXT", "RANKS", "PORT", "ITERATIONS"])
@pytest.mark.parametrize(
    "value", ["$(touch marker)", "$(shell touch {})", "`touch {}`", "';touch {};'", "2;touch {}"]
)
def test_nothing_in_a_value_is_run(tmp_path, name, value):
    value = value.format(tmp_path / "marker")
    words = words_of(tmp_path, f"{name}={value}")
    assert " ".join(words[3:]) == value
    assert not (tmp_path / "marker").exists()
