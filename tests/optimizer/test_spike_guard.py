"""A step that the spike guard skips has never been, on whatever ranks its parameters lie."""

import copy
import logging
import pickle
from dataclasses import replace

import pytest
import torch

from megatron_came import CAME, Shard
from megatron_came.core.spike_guard import LEAST, SpikeGuard
from scripts.cases.simulated_ranks import SimulatedGroup, run_ranks
from scripts.cases.slices import Layout, train_sharded
from tests.support.oracle import BETAS, DEVICES, gradient_history, on_every_path, with_all_kernels
from tests.support.slices import MID_ROW

LAYOUTS = [
    Layout((48, 40), 0, MID_ROW),
    Layout((30, 40), 1, MID_ROW),
    Layout((6, 14, 10), 0, MID_ROW),
    Layout((98,), None, MID_ROW),
]
SPIKE = LEAST + 2


def trained(tp, dp, dtype, kernels, *, has_spike, **more):
    """Weights and all state of every rank after steps of which one is a spike, or without it."""
    layouts = [replace(each, cuts=MID_ROW if dp > 1 else ((),) * tp) for each in LAYOUTS]
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randn(each.shape, generator=generator).to(dtype) for each in LAYOUTS]
    histories = [
        gradient_history(each.shape, SPIKE + 4, "normal", dtype, generator) for each in LAYOUTS
    ]
    for history in histories:
        if has_spike:
            history.insert(SPIKE, 1e3 * history[SPIKE])
    seen = {}

    def look(rank, optimizer, params):
        state = [value.clone() for p in params for value in optimizer.state[p].values()]
        counts = [group["step"] for group in optimizer.param_groups]
        seen[rank] = (state, counts, optimizer.spike_guard and optimizer.spike_guard.skipped)

    weights = train_sharded(
        tp, dp, layouts, starts, histories, BETAS[1], kernels, DEVICES[kernels], look=look, **more
    )
    return weights, [seen[rank] for rank in range(tp * dp)]


@on_every_path
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 4)])
def test_a_skipped_step_leaves_everything_as_it_was(tp, dp, dtype, kernels):
    # On one rank unguarded matrices go through all passes one after another, in another order.
    calm, calm_ranks = trained(tp, dp, dtype, kernels, has_spike=False, spike_guard=1e6)
    guarded, ranks = trained(tp, dp, dtype, kernels, has_spike=True, spike_guard=2.0)
    assert all(map(torch.equal, guarded, calm))
    for (state, counts, skipped), (other, other_counts, none) in zip(
        ranks, calm_ranks, strict=True
    ):
        assert (skipped, none) == (1, 0)
        assert counts == other_counts
        assert all(map(torch.equal, state, other))


@with_all_kernels
def test_without_a_spike_the_guard_changes_nothing(kernels):
    guarded, _ = trained(1, 1, torch.float32, kernels, has_spike=False, spike_guard=1e6)
    free, _ = trained(1, 1, torch.float32, kernels, has_spike=False)
    for one, other in zip(guarded, free, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_ranks_parts_of_an_update_add_up_to_the_whole():
    group = SimulatedGroup([0, 1])

    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    both = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

    def sums(rank, of_rank):
        cut, alike = torch.nn.Parameter(torch.ones(20 + 8 * rank)), torch.nn.Parameter(both.clone())
        low, high = (0, 20) if rank == 0 else (20, 48)
        shards = {
            cut: Shard((6, 8), low, high, dp_group=group),
            alike: Shard((5, 4), 0, 20, tp_group=group),  # whole on both
        }
        optimizer = CAME(list(shards), shards=shards, spike_guard=2.0)
        cut.grad, alike.grad = whole.view(-1)[low:high].clone(), both.clone()
        return optimizer.begin_guarded(of_rank)

    parts = run_ranks(2, lambda rank: sums(rank, True), [group])
    wholes = run_ranks(2, lambda rank: sums(rank, False), [group])
    assert torch.equal(wholes[0], wholes[1])
    assert wholes[0][1] == 48 + 20
    torch.testing.assert_close(sum(parts), wholes[0])


def test_a_guard_costs_no_collective_and_figures_one_for_each_group():
    def count(guard=None, asks=False):
        tp_group, dp_group = (SimulatedGroup([0, 1]) for _ in range(2))

        def program(rank):
            shards = {}
            for shape, tp_dim in [((4, 6), 0), ((4, 6), 1), ((5,), None), ((2, 3, 4), 0)]:
                param = torch.nn.Parameter(torch.randn(shape))
                param.grad = torch.randn(shape)
                shards[param] = Shard(
                    shape, 0, param.numel(), tp_dim, tp_group=tp_group, dp_group=dp_group
                )
            optimizer = CAME(list(shards), shards=shards, spike_guard=guard)
            optimizer.step()
            if asks:
                optimizer.measure()
                optimizer.diagnostics()

        run_ranks(2, program, [tp_group, dp_group])
        return tp_group.calls, dp_group.calls

    assert count(3.0) == count() == (2, 2)
    assert count(asks=True) == (3, 3)


def one(**settings):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(20, 30))
    return param, CAME([param], lr=1e-3, betas=(0.9, 0.99, 0.999), **settings)


def test_each_skipped_step_is_said_and_counted(caplog):
    param, optimizer = one(spike_guard=2.0)
    sentences = []
    optimizer.spike_guard.say = sentences.append
    for step in range(LEAST + 10):
        param.grad = torch.randn_like(param) * (100.0 if step in (LEAST + 1, LEAST + 5) else 1.0)
        optimizer.step()
    assert [sentence.split(" is skipped")[0] for sentence in sentences] == [
        f"CAME: step {LEAST + 2}",
        f"CAME: step {LEAST + 6}",
    ]
    assert "times the median of 17 steps, 3.392 " in sentences[0]
    assert optimizer.diagnostics()["all"]["skipped_steps"] == 2
    assert optimizer.param_groups[0]["step"] == LEAST + 8


def test_what_is_not_finite_is_skipped_from_the_first_step_on(caplog):
    param, optimizer = one(spike_guard=2.0)
    before = param.detach().clone()
    param.grad = torch.full_like(param, float("nan"))
    with caplog.at_level(logging.WARNING, "megatron_came"):
        optimizer.step()
    assert "the RMS of its update is nan, not a finite number" in caplog.text
    assert torch.equal(param, before)
    assert not any(value.any() for value in optimizer.state[param].values())
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert not torch.equal(param, before)


def test_a_lasting_change_is_taken_for_usual_after_half_a_window():
    guard = SpikeGuard(2.0, lambda _: None)
    for rms in [1.0] * 128 + [3.0] * 70:
        guard._judge(rms**2, 1.0)
    assert guard.skipped == 64
    assert guard.is_taken


def test_optimizers_that_step_together_skip_together():
    guard = SpikeGuard(2.0, lambda _: None)
    pairs = [one(spike_guard=2.0) for _ in range(2)]
    guard.members = [optimizer for _, optimizer in pairs]
    for _, optimizer in pairs:
        optimizer.spike_guard = guard
    for step in range(LEAST + 2):
        before = [param.detach().clone() for param, _ in pairs]
        for index, (param, _) in enumerate(pairs):
            is_spike = step == LEAST + 1 and index == 1
            param.grad = torch.randn_like(param) * (1e3 if is_spike else 1.0)
        for _, optimizer in pairs:
            optimizer.step()
        changed = [
            not torch.equal(param, old) for (param, _), old in zip(pairs, before, strict=True)
        ]
        assert changed == [step <= LEAST] * 2
    assert guard.skipped == 1


@pytest.mark.parametrize("factor", [1.0, 0.5, -2, float("nan"), float("inf"), "3", True])
def test_other_factors_are_refused(factor):
    with pytest.raises(ValueError, match=r"spike_guard = .* is not allowed; it must be a finite"):
        one(spike_guard=factor)


def test_copies_have_the_guard():
    _, optimizer = one(spike_guard=2.0)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.spike_guard.factor == 2.0
        twin.step()
