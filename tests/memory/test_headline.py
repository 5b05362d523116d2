"""The README's table of what is saved is what the commands of docs/memory.md print."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_came.memory import command

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| (.+) \| ([\d.]+)% \| ([\d.]+)% \|$", (ROOT / "README.md").read_text(), re.MULTILINE
)
PAGE = (ROOT / "docs" / "memory.md").read_text()
_, _, LAUNCHES = PAGE.partition("The three launches of the README's table")
COMMANDS = re.findall(r"```bash\nmegatron-came memory (.*?)```", LAUNCHES, re.DOTALL)[:3]


def saved(words, capsys, monkeypatch):
    """What CAME saves of AdamW's total on the fullest stage, in percent, by optimizer."""
    monkeypatch.chdir(ROOT)
    assert command.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    totals = {
        name: max(stage["bytes"][name]["total"] for stage in report["stages"])
        for name in ("CAME fp32", "CAME int8 + rem.", "AdamW")
    }
    return {name: 100 * (1 - total / totals["AdamW"]) for name, total in totals.items()}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_saved(place, capsys, monkeypatch):
    words = shlex.split(COMMANDS[place].replace("\\\n", " "))
    found = saved(words, capsys, monkeypatch)
    _, came, smallest = ROWS[place]
    assert found["CAME fp32"] == pytest.approx(float(came), abs=0.06)
    assert found["CAME int8 + rem."] == pytest.approx(float(smallest), abs=0.06)


def test_there_are_three():
    assert len(ROWS) == len(COMMANDS) == 3
