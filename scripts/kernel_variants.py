"""Every variant of the Triton kernels that training uses, and how to compile one without a GPU."""

from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_came.kernels.triton import blocks, factors, launch, tiles, vectors
from megatron_came.kernels.triton.backend import TritonBackend
from megatron_came.kernels.triton.tiling import Tiling

# Triton's own default, which the kernels over factors and vectors take.
_WARPS = 4
_POINTERS = {"groups": "*fp64", "divisors": "*fp32", "scratch": "*fp32"}
_TABLE = "*i64"
_OTHERS = {
    "factors": (
        factors.update_second_moments,
        factors.update_instabilities,
        factors.sum_squared_updates,
    ),
    "vectors": (vectors.square_vectors, vectors.update_vector_moments, vectors.apply_vectors),
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
    usual = TritonBackend.tiling
    tall = replace(usual, rows=usual.tallest)
    turn = usual.columns * launch.STEP
    found = []
    for aligned in (True, False):
        name = "aligned" if aligned else "unaligned"
        for kernel in (tiles.square_tiles, tiles.instability_tiles):
            for tiling, suffix in ((usual, ""), (tall, ", tall")):
                found.append(_variant(kernel, name + suffix, tiling, turn, ALIGNED=aligned))
        found.append(_variant(tiles.apply_tiles, name, usual, turn, ALIGNED=aligned))
    found.append(_variant(blocks.apply_blocks, "int8 momentum", usual, usual.block_elements))
    for tiling, suffix in ((usual, ""), (tall, ", tall")):
        for squares, name in ((True, "pass 1"), (False, "pass 2")):
            turn = launch.ADDITION_TILES * tiling.addition
            kernel = tiles.add_tile_sums
            found.append(_variant(kernel, name + suffix, tiling, turn, SQUARES=squares))
    for name, kernels in _OTHERS.items():
        found += [_variant(kernel, name, usual, launch.BLOCK) for kernel in kernels]
    return found


def _variant(kernel: Any, name: str, tiling: Tiling, elements: int, **flags: bool) -> Variant:
    sizes = launch.constants(tiling)
    own = {size: value for size, value in sizes.items() if size in kernel.arg_names}
    warps = launch.WARPS if own.keys() & {"COLUMNS", "BLOCKS"} else _WARPS
    return Variant(kernel.__name__, name, {**own, **flags}, warps, elements)


VARIANTS = _variants()


def compile_for(variant: Variant, capability: int) -> Any:
    """Compile a variant as a launch would, whose tables lie at multiples of 16 bytes.

    Args:
        variant: one of ``VARIANTS``.
        capability: of the GPU, such as 90.

    Returns:
        Triton's compiled kernel, with ``asm["ptx"]`` and ``asm["cubin"]``.
    """
    module = next(
        module for module in (tiles, blocks, factors, vectors) if hasattr(module, variant.kernel)
    )
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
