"""A step that is skipped when its result is there already."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_came.terminal.paths import write_whole


def run_once(
    file: Path,
    name: str,
    inputs: Mapping[str, object],
    outputs: Sequence[Path],
    make: Callable[[], None],
) -> str:
    """Run ``make`` unless the outputs are there and were made from the same inputs.

    ``file`` remembers what each step was made from: all that its outputs depend on, of JSON's
    types. A digest of it is returned, for the steps that depend on this one.
    """
    try:
        made = dict(json.loads(file.read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        made = {}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    if made.pop(name, None) == digest and all(path.exists() for path in outputs):
        print(f"{name}: already there ({outputs[0]}).")
        return digest
    write_whole(file, json.dumps(made, indent=1).encode())
    make()
    write_whole(file, json.dumps({**made, name: digest}, indent=1).encode())
    return digest
