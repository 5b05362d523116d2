"""Draw the floors of the package from its imports, and a step: docs/floors.svg and docs/step.svg.

    .venv/bin/python scripts/architecture.py

A room is a file or a folder right inside ``megatron_came``. It stands one floor above the highest
room that it imports; ``tests/project/test_floors.py`` fails where imports run in a circle.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_came"
DOCS = ROOT / "docs"
# The package's own top imports the optimizer when that is asked for, and every room its version.
ABOVE_ALL = {"__init__", "__main__", "_version"}

PLAIN, COLLECTIVE, KEPT = "#e8eef7", "#fbe3c8", "#e3f1e1"


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, functions' imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def modules() -> dict[str, Path]:
    """Return the file of every module of the package, by its name with dots."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


def arrows() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    files = modules()
    return {name: imports_of(file) & files.keys() - {name} for name, file in files.items()}


def room_of(module: str) -> str:
    """Return the room that a module is in."""
    return [*module.split("."), "__init__"][1]


def room_arrows() -> dict[str, set[str]]:
    """Return the rooms that each room imports, itself left out."""
    rooms: dict[str, set[str]] = {}
    for module, imported in arrows().items():
        room = room_of(module)
        below = {room_of(name) for name in imported} - {room} - ABOVE_ALL
        rooms.setdefault(room, set()).update(below)
    return {room: below for room, below in rooms.items() if room not in ABOVE_ALL}


def floors() -> list[list[str]]:
    """Return the rooms of every floor, from the ground up.

    Raises:
        graphlib.CycleError: rooms import each other in a circle.
    """
    graph = room_arrows()
    floor: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        floor[room] = max((floor[below] + 1 for below in graph[room]), default=0)
    return [
        sorted(room for room, level in floor.items() if level == number)
        for number in range(max(floor.values()) + 1)
    ]


def _box(axes: plt.Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    shape = FancyBboxPatch(
        (x, y), width, 0.62, boxstyle="round,pad=0.02", facecolor=color, edgecolor="#666666"
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 0.31, text, ha="center", va="center", fontsize=7)


def _arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="->", mutation_scale=8, color="#999999", lw=0.7)
    )


def _figure(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    # The same picture from the same imports, byte for byte.
    plt.rcParams["svg.hashsalt"] = "megatron_came"
    figure, axes = plt.subplots(figsize=(width, height))
    axes.axis("off")
    return figure, axes


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def draw_floors(path: Path) -> None:
    """Draw the rooms, floor above floor; an arrow points to what a room imports.

    An arrow is left out where another room between the two says as much.
    """
    graph, levels = room_arrows(), floors()
    widest = max(map(len, levels))
    figure, axes = _figure(1.55 * widest, 1.0 * len(levels))
    middle: dict[str, tuple[float, float]] = {}
    for level, rooms in enumerate(levels):
        left = (widest - len(rooms)) / 2
        for index, room in enumerate(rooms):
            x, y = left + index, 1.2 * level
            is_folder = (ROOT / PACKAGE / room).is_dir()
            _box(axes, x + 0.04, y, 0.92, room + ("/" if is_folder else ".py"), PLAIN)
            middle[room] = x + 0.5, y
    reached: dict[str, set[str]] = {}
    for room in TopologicalSorter(graph).static_order():
        reached[room] = set().union(*({below} | reached[below] for below in graph[room]))
    for room, belows in graph.items():
        for below in sorted(belows):
            if not any(below in reached[other] for other in belows):
                (x0, y0), (x1, y1) = middle[room], middle[below]
                _arrow(axes, (x0, y0), (x1, y1 + 0.62))
    axes.set_xlim(0, widest)
    axes.set_ylim(-0.1, 1.2 * len(levels) - 0.4)
    _save(figure, path)


# What a step does, from left to right: title, what it reads and makes, colour.
STEP = [
    ("pass 1", "read g\nadd up g^2\nby rows, by columns", PLAIN),
    ("reduction 1", "sums over the ranks\nthat hold the rest", COLLECTIVE),
    ("factors", "r, c  (kept)\nguess d0 of d\nscales of u", KEPT),
    ("pass 2", "read g, m\nadd up e^2, u e, u^2\nby rows, by columns", PLAIN),
    ("reduction 2", "sums over the ranks\nthat hold the rest", COLLECTIVE),
    ("factors", "clip divisor d\nR, C  (kept)\nscales of m", KEPT),
    ("pass 3", "read g, m, p\nwrite m, p", PLAIN),
]
LIVES = (
    "g, m, p: this rank's slice.   Sums: float64, in buffers of many parameters, zeroed at every "
    "step.   r, c, R, C: fp32, whole on every data-parallel rank, in checkpoints by name."
)


def draw_step(path: Path) -> None:
    """Draw the three passes and the two reductions of a step, and where each number lives."""
    figure, axes = _figure(13.5, 2.1)
    for index, (title, text, color) in enumerate(STEP):
        x = index * 1.4
        shape = FancyBboxPatch(
            (x, 0), 1.14, 1.0, boxstyle="round,pad=0.03", facecolor=color, edgecolor="#666666"
        )
        axes.add_patch(shape)
        axes.text(x + 0.57, 0.86, title, ha="center", va="center", fontsize=8.5, weight="bold")
        axes.text(x + 0.57, 0.38, text, ha="center", va="center", fontsize=7.5)
        if index:
            _arrow(axes, (x - 0.23, 0.5), (x - 0.03, 0.5))
    axes.text(0, -0.25, LIVES, fontsize=7.5, va="center")
    axes.set_xlim(-0.1, 1.4 * len(STEP))
    axes.set_ylim(-0.4, 1.1)
    _save(figure, path)


if __name__ == "__main__":
    draw_floors(DOCS / "floors.svg")
    draw_step(DOCS / "step.svg")
