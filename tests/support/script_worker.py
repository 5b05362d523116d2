"""A script as a rank of ``tests.training.harness.fork``: the first argument, with the others."""

import runpy
import sys


def main() -> None:
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
