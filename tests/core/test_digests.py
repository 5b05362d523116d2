"""Digests add up over any cut of a tensor, and notice every change."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import product

import pytest
import torch

from megatron_came.core import digests, records
from megatron_came.core.digests import PlacedBox
from megatron_came.core.records import InBucket, Record, Saved
from megatron_came.kernels.dispatch import adder

_SHAPES = [(), (1,), (7,), (5, 3), (1, 9), (9, 1), (3, 4, 5), (2, 3, 1, 4)]


def _whole(tensor: torch.Tensor) -> int:
    return digests.digest_whole(tensor)


def _digest(part: torch.Tensor, local: tuple[int, ...], box: PlacedBox, *, start: int) -> int:
    return digests.digest(digests.terms(part, local, box, start=start))


def _by_hand(tensor: torch.Tensor) -> int:
    """The sum of the docstring, element by element."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    bits = tensor.contiguous().view(-1).view(torch.int32).tolist()
    rows = digests.row_keys(torch.arange(len(bits) // columns)).tolist()
    keys = digests.column_keys(torch.arange(columns)).tolist()
    return sum(b * rows[i // columns] * keys[i % columns] for i, b in enumerate(bits)) % 2**64


@pytest.mark.parametrize("shape", _SHAPES)
def test_it_is_the_sum_that_it_says(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert _whole(tensor) == _by_hand(tensor)


@pytest.mark.parametrize("shape", [shape for shape in _SHAPES if shape])
def test_slices_of_boxes_add_up(shape: tuple[int, ...]) -> None:
    """As with tensor parallelism along any dimension, and a distributed optimizer's slices."""
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator)
    for dim, size in enumerate(shape):
        for cut in range(size + 1):
            total = 0
            for low, high in ((0, cut), (cut, size)):
                local = tensor.narrow(dim, low, high - low).contiguous()
                offset = tuple(low * (d == dim) for d in range(len(shape)))
                box = PlacedBox((0,) * len(shape), tuple(local.shape), offset, shape)
                ends = sorted(torch.randint(local.numel() + 1, (2,), generator=generator).tolist())
                for start, stop in zip((0, *ends), (*ends, local.numel()), strict=True):
                    part = local.view(-1)[start:stop]
                    total += _digest(part, tuple(local.shape), box, start=start)
            assert digests.unsigned(total) == _whole(tensor)


def test_parts_of_a_local_tensor_stand_apart_in_the_whole_one() -> None:
    """SwiGLU: a rank's rows are rows of the first half and rows of the second."""
    whole = torch.randn(8, 5)
    total = 0
    for rank in range(2):
        local = torch.cat([whole[2 * rank : 2 * rank + 2], whole[4 + 2 * rank : 6 + 2 * rank]])
        for half in range(2):
            box = PlacedBox((2 * half, 0), (2, 5), (4 * half + 2 * rank, 0), (8, 5))
            for start, stop in ((0, 8), (8, 20)):
                part = local.view(-1)[start:stop]
                total += _digest(part, (4, 5), box, start=start)
    assert digests.unsigned(total) == _whole(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_every_flipped_bit_is_noticed(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).mul(10).to(dtype)
    before = _whole(tensor)
    width = tensor.element_size()
    memory = tensor.view(torch.uint8).view(-1)
    for place in range(memory.numel()):
        for bit in range(8):
            memory[place] ^= 1 << bit
            assert _whole(tensor) != before, (place // width, bit + 8 * (place % width))
            memory[place] ^= 1 << bit
    assert _whole(tensor) == before


def test_changes_of_many_elements_are_noticed() -> None:
    tensor = torch.randn(64, 48)
    changed = {
        "rows swapped": tensor[[1, 0, *range(2, 64)]],
        "columns swapped": tensor[:, [1, 0, *range(2, 48)]],
        "negated": -tensor,
        "shifted": tensor.view(-1).roll(1).view(64, 48),
        "transposed": tensor.T.reshape(64, 48),
        "zero": torch.zeros(64, 48),
        "minus zero": torch.zeros(64, 48).neg(),
        "a rectangle of signs": tensor * torch.where(torch.arange(64) % 9 == 0, -1.0, 1.0)[:, None],
        "lower precision": tensor.bfloat16().float(),
        "not a number": tensor.masked_fill(torch.arange(48) == 3, math.nan),
    }
    seen = {_whole(tensor), *map(_whole, changed.values())}
    assert len(seen) == 1 + len(changed)


def test_bf16_counts_as_the_fp32_that_it_is() -> None:
    tensor = torch.randn(7, 9).bfloat16()
    assert digests.digest_whole(tensor, as_fp32=True) == _whole(tensor.float())
    with pytest.raises(TypeError, match="float16"):
        digests.digest_whole(tensor.half(), as_fp32=True)


def test_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(37, 53)
    before = _whole(tensor)
    for at_once in (1, 10, 53, 200):
        monkeypatch.setattr(digests, "_AT_ONCE", at_once)
        assert _whole(tensor) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_the_kernel_adds_up_as_plain_pytorch_does(dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    add = adder(torch.device("cpu"))
    assert add is not digests.add_up
    for shape in _SHAPES:
        tensor = torch.randn(shape).to(dtype)
        assert digests.digest_whole(tensor, add=add) == _whole(tensor)
    whole = torch.randn(6, 7).to(dtype)
    box = PlacedBox((1, 2), (3, 4), (0, 0), (3, 4))
    terms = digests.terms(whole, (6, 7), box)
    assert digests.digest(terms, add) == digests.digest(terms) == _whole(whole[1:4, 2:6])


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_adds_up_rows_longer_than_it_reads_at_once(
    dtype: torch.dtype, rows: int
) -> None:
    pytest.importorskip("numba")
    from megatron_came.kernels.cpu import digests as kernel

    seam = kernel._SIDE_BY_SIDE
    for columns in (seam - 1, seam, seam + 1, 2 * seam + 5):
        tensor = torch.randn(rows, columns).to(dtype)
        terms = digests.terms(tensor, (rows, columns), PlacedBox.whole((rows, columns)))
        (found,), (expected,) = adder(torch.device("cpu"))(terms), digests.add_up(terms)
        assert found.is_finite
        assert digests.unsigned(found.total) == digests.unsigned(expected.total)
        for row, column in product(range(rows), {0, seam - 1, min(seam, columns - 1), columns - 1}):
            damaged = tensor.clone()
            damaged[row, min(column, columns - 1)] = math.inf
            terms = digests.terms(damaged, (rows, columns), PlacedBox.whole((rows, columns)))
            assert not adder(torch.device("cpu"))(terms)[0].is_finite


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, "largest", "-largest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_kernel_finds_what_is_not_finite_wherever_it_stands(
    dtype: torch.dtype, number: float | str
) -> None:
    pytest.importorskip("numba")
    add, largest = adder(torch.device("cpu")), torch.finfo(dtype).max
    value = {"largest": largest, "-largest": -largest}.get(number, number)
    for shape in ((3, 8), (2, 7), (5,), (1,)):
        for place in range(math.prod(shape)):
            tensor = torch.full(shape, -1.5, dtype=dtype)
            tensor.view(-1)[place] = value
            terms = digests.terms(tensor, shape, PlacedBox.whole(shape))
            found = all(each.is_finite for each in add(terms))
            assert found == all(each.is_finite for each in digests.add_up(terms))
            assert found == isinstance(number, str)


def test_threads_add_up_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from megatron_came.kernels.cpu import digests as kernel

    add, threads = adder(torch.device("cpu")), torch.get_num_threads()
    terms = [
        term
        for shape in ((37, 53), (7,), (3, 4, 5))
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
        for term in digests.terms(
            torch.randn(shape).mul(9).to(dtype), shape, PlacedBox.whole(shape)
        )
    ]
    expected = [(digests.unsigned(total), finite) for total, finite in digests.add_up(terms)]
    try:
        for count, taken in ((1, 1 << 20), (3, 1), (3, 100), (2, 1 << 10)):
            monkeypatch.setattr(kernel, "_TAKEN", taken)
            torch.set_num_threads(count)
            assert [(digests.unsigned(total), finite) for total, finite in add(terms)] == expected
    finally:
        torch.set_num_threads(threads)


def _record() -> Record:
    return Record(
        iteration=4,
        optimizer="came",
        step=3,
        tensors={
            "weights": {"a[0][1]": Saved((4, 3), "bfloat16", 2**64 - 1)},
            "exp_avg_sq": {"b": Saved((4,), "float32", 5)},
        },
        buckets={
            "k": (InBucket(2, (2, 3), (("a[0][1]", PlacedBox((0, 0), (2, 3), (2, 0), (4, 3))),)),),
        },
    )


def test_a_record_is_read_as_it_was_written() -> None:
    assert records.unpack(records.pack(_record())) == _record()
    copied = dataclasses.replace(_record(), copies={"momentum": {"a[0][1]": 7}})
    assert records.unpack(records.pack(copied)) == copied


def test_a_record_of_an_earlier_version_keeps_its_length_when_it_is_written_anew() -> None:
    """It said nothing of copies, and is replaced within its file."""
    assert "copies" not in json.loads(records.pack(_record()))


def test_names_have_their_axes() -> None:
    assert digests.split_name("a[0][1]") == ("a", (0, 1))
    assert digests.name_of("a", (0, 1)) == "a[0][1]"
    assert digests.split_name("b") == ("b", ())


def test_a_damaged_record_is_said_to_be() -> None:
    text = records.pack(_record())
    for place in range(0, len(text), 3):
        broken = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        with pytest.raises(records.RecordError):
            records.unpack(broken)
    for other in (None, 3, b"\0", [], "[]", "{}", "null", text[:-5]):
        with pytest.raises(records.RecordError):
            records.unpack(other)
    later = json.loads(text)
    later["format"] = 2
    with pytest.raises(records.RecordError, match="format 2"):
        records.unpack(json.dumps(later))
