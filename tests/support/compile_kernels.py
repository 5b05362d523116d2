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

from megatron_came.kernels.triton import factors, tiles, vectors
from megatron_came.kernels.triton.backend import TritonBackend
from megatron_came.kernels.triton.launch import WARPS, constants

TABLE = "*i64"
POINTERS = {"groups": "*fp64", "divisors": "*fp32", "scratch": "*fp32"}
KERNELS = [
    (tiles, ("square_tiles", "instability_tiles", "apply_tiles", "apply_blocks", "add_tile_sums")),
    (factors, ("update_second_moments", "update_instabilities", "sum_squared_updates")),
    (vectors, ("square_vectors", "update_vector_moments", "apply_vectors")),
]
SIZES = [
    constants(each)
    for each in (
        TritonBackend.tiling,
        replace(TritonBackend.tiling, rows=TritonBackend.tiling.tallest),
    )
]


def variants(kernel):
    """All constants with which a kernel is launched."""
    found = []
    for sizes in SIZES:
        own = {name: size for name, size in sizes.items() if name in kernel.arg_names}
        flags = [name for name in ("ALIGNED", "SQUARES") if name in kernel.arg_names]
        each = [{**own, flags[0]: flag} for flag in (True, False)] if flags else [own]
        found += [one for one in each if one not in found]
    return found


def compile_for_hopper(kernel, constants):
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
        options={"num_warps": WARPS if constants.keys() & {"COLUMNS", "BLOCKS"} else 4},
    )


for module, names in KERNELS:
    for name in names:
        for sizes in variants(getattr(module, name)):
            ptx = compile_for_hopper(getattr(module, name), sizes).asm["ptx"]
            aligned = " aligned" if sizes.get("ALIGNED") else ""
            loads, stores = (f"{verb}.global.v4.b32" in ptx for verb in ("ld", "st"))
            found = "vector loads" * loads + " and stores" * stores
            print(f"{name}{aligned}: {found or 'compiled'}")
