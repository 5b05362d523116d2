"""Steps that are skipped when their result is there already."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_came.data.files import whole_files


class Steps:
    """Remembers in a file what each step was made from."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._made: dict[str, str] = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):
            self._made = {}

    def run(
        self,
        name: str,
        inputs: Mapping[str, object],
        outputs: Sequence[Path],
        make: Callable[[], None],
    ) -> str:
        """Run ``make`` unless the outputs are there and were made from the same inputs.

        Args:
            name: of the step, as it is announced.
            inputs: all that the outputs depend on, of JSON's types.
            outputs: the files that ``make`` writes.
            make: makes them.

        Returns:
            A digest of the inputs, for the steps that depend on this one.
        """
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        if self._made.get(name) == digest and all(path.exists() for path in outputs):
            print(f"{name}: already there ({outputs[0]}).")
            return digest
        self._made.pop(name, None)
        self._save()
        make()
        self._made[name] = digest
        self._save()
        return digest

    def _save(self) -> None:
        with whole_files(self._file) as (partial,):
            partial.write_text(json.dumps(self._made, indent=1))
