"""Every variant of the Triton kernels that training uses, and how to compile one without a GPU."""

from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_came.core import int8
from megatron_came.kernels.triton import factors, tiles, vectors
from megatron_came.kernels.triton.launch import (
    _BLOCK,
    _STEP,
    _STRIP_TILES,
    _TILE_WARPS,
    TritonKernels,
)

# Triton's own default, which the kernels over factors and vectors take.
_WARPS = 4
_POINTERS = {"groups": "*fp64", "divisors": "*fp32", "scratch": "*fp32"}
_TABLE = "*i64"
_OTHERS = {
    "factors": ("update_second_moments", "update_instabilities", "sum_squared_updates"),
    "vectors": ("square_vectors", "update_vector_moments", "apply_vectors"),
}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        kernel: its name.
        name: of the variant.
        constants: its constexpr arguments.
        warps: of a program.
        elements: parameters that a program takes in one turn of its main loop, or in all.
    """

    kernel: str
    name: str
    constants: dict[str, Any]
    warps: int
    elements: int


def _variants() -> list[Variant]:
    usual = TritonKernels.tiling
    tall = replace(usual, rows=usual.tallest)
    tile = {"COLUMNS": usual.columns, "STEP": _STEP}
    turn = usual.columns * _STEP
    found = []
    for aligned in (True, False):
        name = "aligned" if aligned else "unaligned"
        for kernel in ("square_tiles", "instability_tiles"):
            for tiling, suffix in ((usual, ""), (tall, ", tall")):
                constants = {"ROWS": tiling.slot_rows, **tile, "ALIGNED": aligned}
                found.append(Variant(kernel, name + suffix, constants, _TILE_WARPS, turn))
        constants = {**tile, "ALIGNED": aligned}
        found.append(Variant("apply_tiles", name, constants, _TILE_WARPS, turn))
    blocks = {"BLOCKS": usual.span // int8.BLOCK}
    found.append(Variant("apply_spans", "int8 momentum", blocks, _TILE_WARPS, usual.span))
    for tiling, suffix in ((usual, ""), (tall, ", tall")):
        strip = {"WIDTH": tiling.slot_sums, "TILES": _STRIP_TILES, "COUNT": tiling.strip}
        for squares, name in ((True, "pass 1"), (False, "pass 2")):
            constants = {**strip, "SQUARES": squares}
            turn = _STRIP_TILES * tiling.strip
            found.append(Variant("add_strips", name + suffix, constants, _WARPS, turn))
    block = {"BLOCK": _BLOCK}
    for name, kernels in _OTHERS.items():
        found += [Variant(kernel, name, block, _WARPS, _BLOCK) for kernel in kernels]
    return found


VARIANTS = _variants()


def compile_for(variant: Variant, capability: int) -> Any:
    """Compile a variant as a launch would, whose tables lie at multiples of 16 bytes.

    Args:
        variant: one of ``VARIANTS``.
        capability: of the GPU, such as 90.

    Returns:
        Triton's compiled kernel, with ``asm["ptx"]`` and ``asm["cubin"]``.
    """
    module = next(module for module in (tiles, factors, vectors) if hasattr(module, variant.kernel))
    kernel = getattr(module, variant.kernel)
    names = kernel.arg_names
    signature, hints = {}, {}
    for index, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name == "from_row":
            signature[name] = "i32"
        else:
            signature[name] = _POINTERS.get(name, _TABLE)
            hints[(index,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": variant.warps})
