"""Every variant of the Triton kernels that training uses, and how to compile one without a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_came.kernels.triton import blocks, factors, launch, tiles, vectors
from megatron_came.kernels.triton.passes import TritonBackend
from megatron_came.kernels.triton.tables import Kind

_POINTERS = {"groups": "*fp64", "divisors": "*fp32", "partials": "*fp64", "scratch": "*fp32"}
_TABLE = "*i64"
# By what docs/kernels.md calls them. Model: there is a bf16 copy of the weights.
KINDS = {
    "fp32": Kind(),
    "bf16 gradients": Kind(GRAD_IS_BF16=True),
    "bf16 gradients, model": Kind(GRAD_IS_BF16=True, MODEL=1),
    "bf16 gradients and momentum": Kind(GRAD_IS_BF16=True, EXP_AVG_IS_BF16=True),
    "bf16 gradients and momentum, model": Kind(GRAD_IS_BF16=True, EXP_AVG_IS_BF16=True, MODEL=1),
    "16 bits": Kind(GRAD_IS_BF16=True, EXP_AVG_IS_BF16=True, HAS_REMAINDER=True),
    "int8": Kind(INT8=1),
    "bf16 gradients, int8, model": Kind(GRAD_IS_BF16=True, INT8=1, MODEL=1),
    "bf16 gradients, int8, remainders": Kind(GRAD_IS_BF16=True, INT8=1, HAS_REMAINDER=True),
    "int8 across rows": Kind(INT8=2),
    "bf16 gradients, int8 across rows, model": Kind(GRAD_IS_BF16=True, INT8=2, MODEL=1),
}
_UNALIGNED = ("fp32", "bf16 gradients, model", "16 bits", "int8", "int8 across rows")
KINDS |= {f"{name}, unaligned": KINDS[name]._replace(ALIGNED=False) for name in _UNALIGNED}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel of the package."""

    kernel: Any
    name: str  # of the variant
    constants: dict[str, Any]  # its constexpr arguments
    options: dict[str, int]  # of Triton's compiler
    elements: int  # parameters that a program takes in one turn of its main loop, or in all
    whole: bool = False  # whether it takes them in all, and a loop adds up something else


def _variants() -> list[Variant]:
    tiling = TritonBackend.tiling
    tile, ranges = tiling.columns * launch.STEP, launch.BLOCK
    found = []
    for kernel, int8 in (
        (tiles.square_tiles, (0, 1, 2)),
        (tiles.instability_tiles, (0, 1, 2)),
        (tiles.apply_tiles, (0, 1)),
        (blocks.apply_blocks, (2,)),
    ):
        found += _of_kinds(kernel, tile, int8)
    added = launch.ADDITION_TILES * tiling.addition
    for name, squares in (("pass 1", True), ("pass 2", False)):
        found.append(_variant(tiles.add_tile_sums, name, added, SQUARES=squares))
        scales = _variant(factors.scale_factors, name, ranges, SQUARES=squares)
        found.append(replace(scales, whole=True))
    found.append(_variant(factors.update_second_moments, "pass 2", ranges))
    found.append(_variant(factors.sum_squared_updates, "pass 2", launch.MANY))
    found.append(_variant(factors.update_instabilities, "pass 3", ranges))
    for kernel in (vectors.square_vectors, vectors.update_vector_moments):
        found.append(_variant(kernel, "vectors", ranges))
    found.append(_variant(vectors.apply_vectors, "vectors", launch.APPLIED))
    return found


def _of_kinds(kernel: Any, elements: int, int8: Sequence[int]) -> list[Variant]:
    """Return a kernel's variants, by the first kind that it does not tell from others."""
    found: dict[tuple[Any, ...], Variant] = {}
    for name, kind in KINDS.items():
        flags = {key: value for key, value in kind._asdict().items() if key in kernel.arg_names}
        if kind.INT8 in int8:
            found.setdefault((*flags.values(),), _variant(kernel, name, elements, **flags))
    return [*found.values()]


def _variant(kernel: Any, name: str, elements: int, **flags: Any) -> Variant:
    sizes = launch.constants(TritonBackend.tiling)
    own = {size: value for size, value in sizes.items() if size in kernel.arg_names}
    return Variant(kernel, name, {**own, **flags}, launch.options_of(kernel), elements)


VARIANTS = _variants()


def compile_for(variant: Variant, capability: int) -> Any:
    """Compile a variant as a launch would, whose tables lie at multiples of 16 bytes.

    Args:
        variant: one of ``VARIANTS``.
        capability: of the GPU, such as 90.

    Returns:
        Triton's compiled kernel, with ``asm["ptx"]`` and ``asm["cubin"]``.
    """
    names = variant.kernel.arg_names
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
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=variant.options)
