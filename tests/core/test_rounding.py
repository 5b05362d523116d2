"""Stochastic rounding to bf16."""

import torch

from megatron_came.core.rounding import parameter_key, random_bits, step_key, to_bf16

PLACES = torch.arange(1 << 18)


def bits(name="weight", step=0, seed=0, places=PLACES):
    return random_bits(places, step_key(parameter_key(seed, name), step))


def test_bits_are_uniform():
    counts = torch.bincount(bits() >> 8, minlength=256).double()
    expected = len(PLACES) / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 180 < chi_squared < 340  # 255 degrees of freedom: beyond four standard deviations


def test_bits_of_other_places_steps_parameters_and_seeds_are_unrelated():
    here = bits().double()
    others = [bits(step=1), bits(name="bias"), bits(seed=1), bits().roll(1), bits().roll(1024)]
    others.append(bits(places=PLACES + (1 << 32)))
    for other in others:
        assert torch.corrcoef(torch.stack([here, other.double()]))[0, 1].abs() < 0.01


def test_rounding_is_to_a_neighbour_and_right_on_average():
    values = torch.full((len(PLACES),), 1.001)
    rounded = to_bf16(values, bits()).float()
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    # The standard error of the mean is 0.0078 * sqrt(p (1 - p) / n).
    assert abs(rounded.mean().item() - 1.001) < 4 * 0.0078 * 0.34 / len(PLACES) ** 0.5


def test_what_bf16_holds_stays():
    values = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), -float("inf"), 1e-40])
    values[-1] = values[-1].to(torch.bfloat16).float()
    rounded = to_bf16(values, torch.full((7,), 0xFFFF))
    assert torch.equal(rounded.float(), values)
    assert to_bf16(torch.tensor([float("nan")]), torch.tensor([0xFFFF])).isnan().all()
