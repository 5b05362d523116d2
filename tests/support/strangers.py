"""Checkpoints of strangers: things that run when they are unpickled, and how they are refused."""

from pathlib import Path

from megatron_came.tools import inspect


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        if self.state is None:
            return self.function, self.arguments
        return self.function, self.arguments, self.state


def refused(root: Path, capsys, marker: Path) -> str:
    """Inspect a checkpoint that must be refused in a sentence; returns the sentence."""
    assert inspect.main([str(root)]) == 2
    said = capsys.readouterr()
    assert not marker.exists()
    assert said.err.count("\n") == 1
    assert said.err.startswith("megatron-came inspect: ")
    return said.err
