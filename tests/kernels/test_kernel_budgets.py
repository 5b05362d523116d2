"""The machine code of the Triton kernels keeps within budgets; compiling takes no GPU."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is missing")

from scripts.machine_code import _instructions, _longest_path, _main_loop

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Budget:
    """At most, on sm_90 with the pinned Triton; warps at least."""

    registers: int
    instructions: float
    barriers: int
    warps: int


# A tenth above what docs/kernels.md has, so that another release of ptxas fits.
BUDGETS = {
    "square_tiles fp32": Budget(53, 9.0, 0, 32),
    "square_tiles bf16 gradients": Budget(53, 10.4, 0, 32),
    "square_tiles fp32, unaligned": Budget(53, 12.0, 0, 32),
    "instability_tiles fp32": Budget(80, 22.4, 0, 24),
    "instability_tiles bf16 gradients and momentum": Budget(80, 25.2, 0, 24),
    "instability_tiles int8": Budget(80, 26.6, 0, 24),
    "instability_tiles int8 across rows": Budget(80, 29.4, 0, 24),
    "apply_tiles fp32": Budget(80, 14.0, 0, 24),
    "apply_tiles bf16 gradients, model": Budget(80, 23.0, 0, 24),
    "apply_tiles 16 bits": Budget(80, 44.9, 0, 24),
    "apply_tiles int8": Budget(80, 43.8, 2, 24),
    "apply_tiles 16 bits, unaligned": Budget(80, 62.0, 0, 24),
    "apply_blocks int8 across rows": Budget(80, 60.0, 2, 24),
    "update_second_moments pass 2": Budget(60, 56.5, 5, 32),
    "update_instabilities pass 3": Budget(80, 87.0, 2, 24),
    "scale_factors pass 2": Budget(53, 136.0, 8, 32),
    "apply_vectors vectors": Budget(80, 193.0, 5, 24),
}
# Of a step of GPT-2 Medium on an H200, modelled: how long it takes at most, in AdamW's time.
TIMES = {
    "fp32": 1.2,
    "fp32, int8 momentum": 1.0,
    "bf16 gradients and model, fp32 momentum": 0.8,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "kernels.json"
    command = [sys.executable, "scripts/kernel_report.py", "--arch", "sm_90", "--json", str(file)]
    command += ["--only", *BUDGETS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        f"{row['kernel']} {row['variant']}": row for row in json.loads(file.read_text())["kernels"]
    }


@pytest.mark.parametrize("name", BUDGETS)
def test_a_kernel_keeps_to_its_budget(name, rows):
    row, budget = rows[name], BUDGETS[name]
    assert row["registers"] <= budget.registers
    assert row["instructions_per_parameter"] <= budget.instructions
    assert row["barriers"] <= budget.barriers
    assert row["resident_warps"] >= budget.warps
    assert row["spilled_bytes"] == 0


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("square_tiles fp32", {"LDG.128", "STG.128"}),
        ("instability_tiles bf16 gradients and momentum", {"LDG.64", "STG.128"}),
        ("apply_tiles 16 bits", {"LDG.64", "STG.64"}),
        ("apply_tiles int8", {"LDG.128", "STG.128"}),
        ("apply_blocks int8 across rows", {"LDG.128", "STG.128"}),
    ],
)
def test_aligned_elements_are_moved_by_fours(name, widths, rows):
    found = set(rows[name]["widths"])
    assert widths <= found
    assert not {each for each in found if each.endswith(("U8", "S8", "U16", "S16"))}


def report():
    return json.loads((ROOT / "docs" / "kernels.json").read_text())


def test_an_sm_holds_24_warps_of_every_kernel_without_spills():
    """A rare one spills a little: pass 3 of int8 momentum whose blocks are not rows of tiles."""
    for row in report()["kernels"]:
        assert row["resident_warps"] >= 24, row
        assert row["spilled_bytes"] <= 24 * (row["variant"] == "int8 across rows, unaligned"), row


@pytest.mark.parametrize("setting", TIMES)
def test_a_modelled_step_keeps_to_its_time(setting):
    (row,) = (
        row
        for row in report()["modelled"]
        if (row["gpu"], row["model"], row["setting"]) == ("H200", "gpt2-medium", setting)
    )
    assert row["milliseconds"] <= TIMES[setting] * row["adamw_milliseconds"]
    assert row["factor_milliseconds"] <= 0.02


def test_every_kernel_is_in_the_report():
    from megatron_came.kernels.triton import blocks, factors, tiles, vectors

    compiled = {row["kernel"] for row in report()["kernels"]}
    modules = (blocks, factors, tiles, vectors)
    source = "".join(Path(module.__file__).read_text() for module in modules)
    assert set(re.findall(r"@kernel\ndef (\w+)", source)) == compiled


# A loop with a choice in it: the longer way has the barrier, and the back branch ends the loop.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   BAR.SYNC 0x0 ;
        /*0040*/                   SHFL.BFLY R0, R1 ;
.L_x_2:
        /*0050*/                   FADD R0, R0, R4 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_the_longest_way_through_the_loop_is_counted():
    found = _instructions(LISTING)
    assert _main_loop(found) == (1, 6)
    names = [found[index].name for index in _longest_path(found, 1, 6)]
    assert names == ["LDG.E.128", "BRA", "BAR.SYNC", "SHFL.BFLY", "FADD", "BRA"]


def test_a_folder_without_triton_is_a_sentence(tmp_path):
    command = [sys.executable, "scripts/kernel_report.py", "--triton", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no Triton in" in done.stdout
