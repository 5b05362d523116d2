"""Judge the Triton kernels by their machine code: docs/kernels.md and docs/kernels.json. No GPU.

    .venv/bin/python scripts/kernel_report.py [--arch sm_90 ...] [--triton FOLDER] [--json FILE]

Compiles every kernel for each architecture, reads its registers, spills and main loop from the
cubin, and models the time of a step from them. ``--json`` writes the measured numbers to another
file and leaves docs/ alone; ``--triton`` is a folder in which another Triton is installed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, FILE = ROOT / "docs" / "kernels.md", ROOT / "docs" / "kernels.json"
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

from scripts.machine_code import Code, read  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# Shared memory and warps of an SM (CUDA C++ programming guide, compute capabilities).
_SHARED = {"sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # KiB
_WARPS = {"sm_80": 64, "sm_89": 48, "sm_90": 64, "sm_100": 64, "sm_120": 48}
_REGISTERS, _BLOCKS = 64 * 1024, 32
# A block takes so much shared memory beyond its own.
_RESERVED = 1024


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do: SMs, clock in GHz, and the TB/s that a copy reaches (assumed)."""

    architecture: str
    sms: int
    gigahertz: float
    terabytes: float


# Copies reach about nine tenths of the bandwidth in the data sheets.
GPUS = {
    "A100": Gpu("sm_80", 108, 1.41, 1.8),
    "H100": Gpu("sm_90", 132, 1.98, 3.0),
    "H200": Gpu("sm_90", 132, 1.98, 4.3),
    "B200": Gpu("sm_100", 148, 1.85, 7.2),
    "L40S": Gpu("sm_89", 142, 2.52, 0.78),
}
# Of each pass, the variant that it runs and the bytes a parameter that it moves: of gradient,
# momentum, weights and the model's copy.
SETTINGS = {
    "fp32": (("fp32", 4), ("fp32", 4 + 4), ("fp32", 4 + 8 + 8)),
    "fp32, int8 momentum": (("fp32", 4), ("int8", 4 + 1), ("int8", 4 + 2 + 8)),
    "bf16 gradients and model, fp32 momentum": (
        ("bf16 gradients", 2),
        ("bf16 gradients", 2 + 4),
        ("bf16 gradients, model", 2 + 8 + 8 + 2),
    ),
}
PASSES = ("square_tiles", "instability_tiles", "apply_tiles")
ADAMW = {"fp32": 28, "fp32, int8 momentum": 28, "bf16 gradients and model, fp32 momentum": 40}
MODELS = ("gpt2-small", "gpt2-medium", "gpt2-xl", "llama-7b-layer")
LAUNCHES, LAUNCH_SECONDS = 13, 2.5e-6
# A program that is alone on its SM waits for each instruction before the next.
CLOCKS_ALONE = 4.5
FACTOR_KERNELS = ("update_second_moments", "scale_factors", "update_instabilities")
FACTOR_WARPS, FACTOR_ELEMENTS = 4, 1024  # of one of their programs: warps, and what it takes
FACTOR_SHAPE = (50304, 1024)


@dataclass(frozen=True)
class Row:
    """One kernel, compiled: see docs/kernels.md for the columns."""

    kernel: str
    variant: str
    architecture: str
    triton: str
    registers: int
    spilled_bytes: int
    resident_warps: int
    instructions_per_parameter: float
    barriers: int
    shuffles: int
    widths: tuple[str, ...]


def resident_warps(code: Code, architecture: str, warps: int, shared: int) -> int:
    """Return how many warps an SM holds of a kernel at once."""
    per_warp = math.ceil(code.registers * 32 / 256) * 256
    by_registers = _REGISTERS // (per_warp * warps)
    by_shared = _SHARED[architecture] * 1024 // (shared + _RESERVED)
    return min(by_registers, by_shared, _WARPS[architecture] // warps, _BLOCKS) * warps


def compile_rows(architecture: str, only: Sequence[str] = ()) -> list[Row]:
    """Compile every kernel, or only some, for an architecture with the Triton that is installed."""
    import triton

    from scripts.kernel_variants import VARIANTS, compile_for

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    rows = []
    for variant in VARIANTS:
        if only and f"{variant.kernel.__name__} {variant.name}" not in only:
            continue
        warps = variant.options["num_warps"]
        compiled = compile_for(variant, int(architecture.removeprefix("sm_")))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            code = read(file.name, tools, variant.whole)
        rows.append(
            Row(
                kernel=variant.kernel.__name__,
                variant=variant.name,
                architecture=architecture,
                triton=triton.__version__,
                registers=code.registers,
                spilled_bytes=code.spilled_bytes,
                resident_warps=resident_warps(code, architecture, warps, compiled.metadata.shared),
                instructions_per_parameter=round(
                    code.instructions * 32 * warps / variant.elements, 1
                ),
                barriers=code.barriers,
                shuffles=code.shuffles,
                widths=code.widths,
            )
        )
    return rows


def milliseconds(rows: list[Row], gpu: Gpu, setting: str, shapes: Sequence[Sequence[int]]) -> float:
    """Model a step: of each pass, the slower of moving its bytes and issuing its instructions."""
    of = {
        (row.kernel, row.variant): row.instructions_per_parameter
        for row in rows
        if row.architecture == gpu.architecture
    }
    parameters = sum(map(math.prod, shapes))
    issue = gpu.sms * 128 * gpu.gigahertz * 1e9  # threads' instructions a second
    seconds = LAUNCHES * LAUNCH_SECONDS
    for kernel, (variant, moved) in zip(PASSES, SETTINGS[setting], strict=True):
        computing = of[kernel, variant] * parameters / issue
        seconds += max(moved * parameters / (gpu.terabytes * 1e12), computing)
    return seconds * 1e3 + factor_milliseconds(rows, gpu, shapes)


def factor_milliseconds(
    rows: list[Row], gpu: Gpu, shapes: Sequence[Sequence[int]] = (FACTOR_SHAPE,)
) -> float:
    """Model the kernels over factors: the slower of one program alone, and of issuing for all."""
    sizes = [size for shape in shapes if len(shape) > 1 for size in shape[-2:]]
    clocks = 0.0
    for row in rows:
        if row.architecture == gpu.architecture and row.kernel in FACTOR_KERNELS:
            program = row.instructions_per_parameter * FACTOR_ELEMENTS / (32 * FACTOR_WARPS)
            programs = sum(math.ceil(size / FACTOR_ELEMENTS) for size in sizes)
            issued = programs * program * FACTOR_WARPS / (4 * gpu.sms)
            clocks += max(program * CLOCKS_ALONE, issued)
        elif row.architecture == gpu.architecture and row.kernel == "sum_squared_updates":
            most = max(sizes, default=0)  # whose row sums one program adds up
            clocks += row.instructions_per_parameter * most / 256 * CLOCKS_ALONE
    return clocks / (gpu.gigahertz * 1e9) * 1e3


def summary(rows: list[Row]) -> list[dict[str, object]]:
    """Return the modelled milliseconds of every GPU, setting and model."""
    from megatron_came.bench.shapes import shapes_of

    all_shapes = {model: shapes_of(model) for model in MODELS}
    known = {row.architecture for row in rows}
    return [
        {
            "gpu": name,
            "setting": setting,
            "model": model,
            "milliseconds": round(milliseconds(rows, gpu, setting, shapes), 3),
            "adamw_milliseconds": round(
                ADAMW[setting] * sum(map(math.prod, shapes)) / (gpu.terabytes * 1e9), 3
            ),
            "factor_milliseconds": round(factor_milliseconds(rows, gpu), 3),
        }
        for name, gpu in GPUS.items()
        if gpu.architecture in known
        for setting in SETTINGS
        for model, shapes in all_shapes.items()
    ]


HEAD = """\
# The Triton kernels by their machine code

*Written by `make kernel-report` (`scripts/kernel_report.py`). **Modelled, not measured**: compiled and disassembled
without a GPU, with Triton {triton}.*

Registers and spilled bytes are of a thread; resident warps of an SM. Instructions are those that a thread issues for one
parameter in the main loop, along its longest path; barriers and shuffles are of one turn of that loop, widths the
accesses to global memory in it. For kernels over factors and vectors, which mostly have no loop, a parameter is one of
their elements. A variant is named by the first kind that is compiled into the kernel; *model*: there is a bf16 copy of
the weights; *across rows*: blocks of int8 momentum are not rows of tiles; *unaligned*: addresses, widths or bounds of
the slice are not those of vector loads.
"""
MODEL = """
## A step, modelled

For each pass the larger of two times: the bytes that it moves over the bandwidth that a copy reaches, and its
instructions over the rate at which the SMs issue them; {launches} launches of {microseconds} us; and the kernels over factors,
of each the slower of one program, alone on an SM with {clocks} clocks an instruction, and of issuing for all. One
data-parallel rank. AdamW: the time of its bytes alone (28 a parameter; with bf16 gradients and model 40). Factors: those
kernels for one matrix of {rows} rows, without launches; on GPUs with little fp64, such as an L40S, they take longer.
Assumed: {gpus}.
"""


def page(rows: list[Row]) -> str:
    """Return docs/kernels.md."""
    fields = [field for field in Row.__dataclass_fields__ if field != "triton"]
    lines = [HEAD.format(triton=rows[0].triton), _line(field.replace("_", " ") for field in fields)]
    lines.append("|---" * len(fields) + "|")
    for row in rows:
        values = asdict(row) | {"widths": " ".join(row.widths)}
        lines.append(_line(str(values[field]) for field in fields))
    gpus = "; ".join(
        f"{name} {gpu.sms} SMs, {gpu.gigahertz} GHz, {gpu.terabytes} TB/s"
        for name, gpu in GPUS.items()
    )
    lines.append(
        MODEL.format(
            launches=LAUNCHES,
            microseconds=LAUNCH_SECONDS * 1e6,
            rows=FACTOR_SHAPE[0],
            clocks=CLOCKS_ALONE,
            gpus=gpus,
        )
    )
    lines += [_line(["GPU", "setting", "model", "CAME, ms", "AdamW, ms", "times", "factors, ms"])]
    lines.append("|---" * 7 + "|")
    for one in summary(rows):
        came, adamw = float(one["milliseconds"]), float(one["adamw_milliseconds"])
        names = [one["gpu"], one["setting"], one["model"]]
        numbers = [f"{came:.3f}", f"{adamw:.3f}", f"{came / adamw:.2f}"]
        lines.append(_line(map(str, [*names, *numbers, one["factor_milliseconds"]])))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def report(
    architectures: Sequence[str],
    triton_folder: Path | None,
    file: Path | None,
    only: Sequence[str],
) -> int:
    """Compile, and write the report; return an exit status."""
    if triton_folder is not None and os.environ.get("PYTHONPATH") != str(triton_folder):
        if not (triton_folder / "triton" / "__init__.py").exists():
            print(f"kernel-report: no Triton in {triton_folder}: pip install --target it.")
            return 2
        command = [sys.executable, *sys.argv]  # anew, with that Triton first on the search path
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(triton_folder)}
        ).returncode
    rows = []
    for architecture in architectures:
        print(f"Compiling for {architecture}.", flush=True)
        rows += compile_rows(architecture, only)
    found = {"kernels": [asdict(row) for row in rows]}
    found |= {} if only else {"modelled": summary(rows)}
    (file or FILE).write_text(json.dumps(found, indent=1) + "\n")
    if file is None:
        PAGE.write_text(page(rows))
    return 0


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--triton", type=Path, help="folder in which another Triton is installed")
    parser.add_argument("--json", type=Path, help="write the numbers there, and not docs/")
    parser.add_argument("--only", nargs="+", help="kernels with their variants; needs --json")
    options = parser.parse_args()
    if options.only and options.json is None:
        parser.error("--only leaves docs/ without the others: give --json as well.")
    return report(options.arch, options.triton, options.json, options.only or ())


if __name__ == "__main__":
    sys.exit(main())
