"""Compile every Triton kernel for an H100 or H200, which takes no GPU."""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_came.core import int8
from megatron_came.kernels.triton import factors, tiles, vectors
from megatron_came.kernels.triton.launch import _BLOCK, _STEP, _STRIP_TILES, TritonBackend

TABLE = "*i64"
POINTERS = {"groups": "*fp64", "divisors": "*fp32", "scratch": "*fp32"}
tiling = TritonBackend.tiling
TILE = {"COLUMNS": tiling.columns, "STEP": _STEP}
TALLEST = replace(tiling, rows=tiling.tallest)
SLOTS = [{"ROWS": each.slot_rows, **TILE} for each in (tiling, TALLEST)]
STRIPS = [
    {"WIDTH": each.slot_sums, "TILES": _STRIP_TILES, "COUNT": each.strip}
    for each in (tiling, TALLEST)
]
VARIANTS = {
    "square_tiles": [{**slot, "ALIGNED": a} for slot in SLOTS for a in (True, False)],
    "instability_tiles": [{**slot, "ALIGNED": a} for slot in SLOTS for a in (True, False)],
    "apply_tiles": [{**TILE, "ALIGNED": aligned} for aligned in (True, False)],
    "apply_spans": [{"BLOCKS": tiling.span // int8.BLOCK}],
    "add_strips": [{**strip, "SQUARES": s} for strip in STRIPS for s in (True, False)],
    "update_second_moments": [{"BLOCK": _BLOCK}],
    "update_instabilities": [{"BLOCK": _BLOCK}],
    "sum_squared_updates": [{"BLOCK": _BLOCK}],
    "square_vectors": [{"BLOCK": _BLOCK}],
    "update_vector_moments": [{"BLOCK": _BLOCK}],
    "apply_vectors": [{"BLOCK": _BLOCK}],
}


def compile_for_hopper(name, constants):
    module = next(m for m in (tiles, factors, vectors) if hasattr(m, name))
    kernel = getattr(module, name)
    signature = {
        argument: "constexpr"
        if argument in constants
        else "i32"
        if argument == "from_row"
        else POINTERS.get(argument, TABLE)
        for argument in kernel.arg_names
    }
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8 if constants.keys() & {"COLUMNS", "BLOCKS"} else 4},
    )


for name, variants in VARIANTS.items():
    for constants in variants:
        ptx = compile_for_hopper(name, constants).asm["ptx"]
        aligned = " aligned" if constants.get("ALIGNED") else ""
        loads, stores = (f"{verb}.global.v4.b32" in ptx for verb in ("ld", "st"))
        found = "vector loads" * loads + " and stores" * stores
        print(f"{name}{aligned}: {found or 'compiled'}")
