"""The command ``megatron-came``."""

import sys

from megatron_came._version import __version__

# Whatever else is needed is imported in functions, where Ctrl-C is looked after already.

# Each command's module, which has a main(arguments), what it takes, and what it does.
_COMMANDS = {
    "bench": ("bench.command", "", "time a step of CAME beside other optimizers"),
    "compare": ("compare.command", "PRESET", "train one model with several optimizers"),
    "data": ("data.command", "INPUT ...", "make a dataset for Megatron of text"),
    "flags": ("tools.flags", "", "list the flags of --optimizer came, and variables"),
    "help": ("", "[COMMAND]", "say how to use a command"),
    "inspect": ("tools.inspect", "CHECKPOINT", "list what a checkpoint of Megatron holds"),
    "memory": ("memory.command", "FLAGS...", "predict the memory of every GPU of a launch"),
    "patch": ("tools.patch", "CHECKOUT", "let a checkout's own script know --optimizer came"),
    "plot": ("tools.plot", "RUN ...", "draw what Megatron wrote for TensorBoard"),
    "repair": ("tools.repair", "FROM TO", "copy a checkpoint, its main weights made anew"),
}
_NOBODY_READS = 141  # what a shell gives a program that SIGPIPE has ended
_AGAIN = "interrupted: run it again to go on after the last finished run."
# Seconds to clean up after Ctrl-C, for commands that write files; None is as long as it takes.
_GRACE = {"data": None, "patch": 0.7, "repair": None}


def _usage() -> str:
    rows = [(f"{name} {takes}", does) for name, (_, takes, does) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-came COMMAND ...",
            "       megatron-came --version",
            "",
            "commands:",
            *(f"  {left:<20}{does}" for left, does in rows),
            "",
            "megatron-came help COMMAND says more of one. To train: torchrun ... -m",
            "megatron_came.launch SCRIPT FLAGS, or -m megatron_came.pretrain_gpt FLAGS.",
        ]
    )


def _run(command: str, rest: list[str]) -> int:
    import importlib

    status: int = importlib.import_module(f"megatron_came.{_COMMANDS[command][0]}").main(rest)
    return status


def main() -> int:
    """Run the command that the command line names; return its exit status."""
    import errno
    import os

    try:
        from megatron_came.terminal.console import open_streams

        open_streams()
        status = _main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("megatron-came: interrupted.", file=sys.stderr)
        return 130  # what a shell gives a program that SIGINT has ended
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
            reason = (error.strerror or str(error)).lower()
            # Without a name it is os.getcwd() that found nothing.
            gone = "the current folder" if error.errno == errno.ENOENT else "a file"
            what = f"{error.filename or gone} cannot be used ({reason})"
            print(f"megatron-came: {what}: put that right.", file=sys.stderr)
            return 1
        # What is left to print is lost, and must not end in an error of its own.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        if error.errno == errno.EPIPE:  # nobody reads on, as in "| head"
            os.dup2(nothing, 2)
            return _NOBODY_READS
        print("megatron-came: nothing more can be printed (no space left).", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megatron_came"):  # a fault of this package
            raise
        package = f"The package {error.name}, which this command needs, is not installed"
        print(f"megatron-came: {package}: pip install megatron-came again.", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # of which PyTorch says so on a CPU
        print("megatron-came: memory ran out: ask for less at a time.", file=sys.stderr)
        return 1
    return status


def _main() -> int:
    command, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command == "help":
        command, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command in ("-V", "--version"):
        print(f"megatron-came {__version__}")
        return 0
    if command not in _COMMANDS:
        print(f"megatron-came: there is no command {command}.\n{_usage()}", file=sys.stderr)
        return 2
    from megatron_came.terminal.interrupts import in_one_line

    line = f"megatron-came {command}: {_AGAIN if command == 'compare' else 'interrupted.'}"
    return in_one_line(lambda: _run(command, rest), line, grace=_GRACE.get(command, 0.0))


if __name__ == "__main__":
    sys.exit(main())
