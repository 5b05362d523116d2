"""One rank of a run: the GPT training program with a meter on its optimizers.

    torchrun ... -m megatron_came.quickstart.worker FOLDER FLAGS...

It writes what it measured to FOLDER/rankN.json; the flags are Megatron's.
"""

import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path

from megatron_came.quickstart.meter import Meter


def main() -> None:
    """Trains as the flags say, and writes the measurement."""
    folder = Path(sys.argv.pop(1))
    meter = Meter()
    runpy.run_module("megatron_came.pretrain_gpt", run_name="__main__", alter_sys=True)
    measured = meter.read(main_weights="--bf16" in sys.argv)
    file = folder / f"rank{os.environ['RANK']}.json"
    file.write_text(json.dumps(dataclasses.asdict(measured)))


if __name__ == "__main__":
    main()
