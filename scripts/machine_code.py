"""What a cubin says of its kernel: registers, spills, and the main loop's instructions."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\d+)\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
_TARGET = re.compile(r"`?\(?(\.L_x_\d+)\)?")
_ENDS = ("BRA", "EXIT", "RET")


@dataclass(frozen=True)
class Code:
    """Of one kernel."""

    registers: int  # of a thread
    spilled_bytes: int  # of a thread, in local memory
    # That a warp issues in one turn of the main loop, along its longest path; in the whole kernel
    # where there is no such loop. Barriers and shuffles are of these.
    instructions: int
    barriers: int
    shuffles: int
    widths: tuple[str, ...]  # kinds of accesses to global memory among these, such as LDG.128


@dataclass(frozen=True)
class _Instruction:
    address: int
    is_predicated: bool
    name: str
    target: int | None


def read(cubin: str, tools: Path, whole: bool = False) -> Code:
    """Read a cubin of one kernel.

    Args:
        cubin: its file.
        tools: folder of ``cuobjdump`` and ``nvdisasm``.
        whole: count the whole kernel, with one turn of each loop.
    """
    usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
    registers, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    found = _instructions(_run(tools / "nvdisasm", "-c", cubin))
    path = _longest_path(found, *((0, len(found) - 1) if whole else _main_loop(found)))
    names = [found[index].name for index in path]
    return Code(
        registers=registers,
        spilled_bytes=local,
        instructions=len(names),
        barriers=sum(name.startswith("BAR") for name in names),
        shuffles=sum(name.startswith("SHFL") for name in names),
        widths=tuple(sorted({_width(name) for name in names if name[:3] in ("LDG", "STG")})),
    )


def _run(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    ).stdout


def _width(name: str) -> str:
    bits = [word for word in name.split(".") if word in ("64", "128", "U8", "S8", "U16", "S16")]
    return ".".join([name[:3], *(bits or ["32"])])


def _instructions(listing: str) -> list[_Instruction]:
    labels: dict[str, int] = {}
    found: list[tuple[int, bool, str, str]] = []
    waiting: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            waiting.append(label[1])
        elif match := _INSTRUCTION.search(line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            found.append((address, match[2] is not None, match[3], match[4]))
    instructions = []
    for address, is_predicated, name, rest in found:
        label = _TARGET.search(rest) if name.startswith("BRA") else None
        target = labels.get(label[1]) if label else None
        # A branch may have its predicate behind: "BRA P0, `(.L_x_1)".
        is_predicated |= name.startswith("BRA") and bool(re.search(r"\bU?P\d", rest))
        instructions.append(_Instruction(address, is_predicated, name, target))
    return instructions


def _main_loop(found: list[_Instruction]) -> tuple[int, int]:
    """Return first and last index of the innermost loop that reads most of global memory."""
    index_of = {each.address: index for index, each in enumerate(found)}
    loops = [
        (index_of[each.target], last)
        for last, each in enumerate(found)
        if each.target is not None and each.target < each.address
    ]
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    if not inner:
        return 0, len(found) - 1

    def accesses(loop: tuple[int, int]) -> int:
        return sum(each.name[:3] in ("LDG", "STG") for each in found[loop[0] : loop[1] + 1])

    best = max(inner, key=accesses)
    return best if accesses(best) else (0, len(found) - 1)


def _longest_path(found: list[_Instruction], first: int, last: int) -> list[int]:
    """Return the instructions of the longest way from the first to the last, without turning."""
    index_of = {each.address: index for index, each in enumerate(found)}
    length: dict[int, int] = {}
    following: dict[int, int | None] = {}
    for index in range(last, first - 1, -1):
        each = found[index]
        ways = []
        if each.target is not None and first <= index < index_of[each.target] <= last:
            ways.append(index_of[each.target])
        falls_through = each.is_predicated or not each.name.startswith(_ENDS)
        if falls_through and index < last:
            ways.append(index + 1)
        follows = max((way for way in ways if way in length), key=length.__getitem__, default=None)
        length[index] = 1 + (length[follows] if follows is not None else 0)
        following[index] = follows
    path, at = [], first
    while at is not None:
        path.append(at)
        at = following[at]
    return path
