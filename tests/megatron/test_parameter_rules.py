"""``--came-rule``: what is read, which parameters follow, and what is refused."""

import pytest
import torch

from megatron_came.megatron import parameter_rules
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import is_factored, own_settings


class Chunk(torch.nn.Module):
    """Parameters by name, without a sharded state."""

    def __init__(self, *names, frozen=()):
        super().__init__()
        self.named = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in names}
        for name in frozen:
            self.named[name].requires_grad = False

    def named_parameters(self):
        return iter(self.named.items())


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["*", "beta2=0.9"], {"beta2": 0.9}),
        (["*", "clip-threshold=2", "eps1=1e-20"], {"clip_threshold": 2.0, "eps1": 1e-20}),
        (["*", "factored=no"], {"factored": False}),
        ("* beta2=0.9 factored=no", {"beta2": 0.9, "factored": False}),
        (["*", "factored=TRUE", "cautious=on"], {"factored": True, "cautious": True}),
        (["*", "beta1=0.9", "beta1=0.8"], {"beta1": 0.8}),
    ],
)
def test_words_are_read(words, settings):
    (rule,) = parameter_rules.parsed([words])
    assert (rule.pattern, rule.settings) == ("*", settings)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["*"], r"--came-rule \* has no setting: add some"),
        (["*", "beta2"], "beta2 is no setting: give NAME=VALUE with one of beta1,"),
        (["*", "lr=0.1"], "lr=0.1 is no setting: give NAME=VALUE"),
        (["*", "beta2=big"], "beta2 must be a number, not 'big'"),
        (["*", "beta2=1.0"], r"beta2 1.0 is not allowed: it must be in \[0, 1\)"),
        (["*", "beta2=nan"], "beta2 nan is not allowed"),
        (["*", "clip_threshold=-1"], "clip_threshold -1.0 is not allowed"),
        (["*", "factored=maybe"], "factored must be yes or no, not 'maybe'"),
        (["*", "factored="], "factored must be yes or no, not ''"),
    ],
)
def test_what_is_no_rule_is_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        parameter_rules.parsed([["*", "beta1=0.5"], words])


def test_of_two_rules_the_last_decides_each_setting():
    chunk = Chunk("embedding.weight", "layer.bias", "head.weight")
    rules = [["*weight", "beta2=0.9", "factored=no"], ["*ing.*", "beta2=0.8", "eps2=1e-9"]]
    parameter_rules.note(rules, [chunk])
    embedding, bias, head = chunk.named.values()
    assert own_settings(embedding) == {"beta2": 0.8, "eps2": 1e-9}
    assert own_settings(head) == {"beta2": 0.9}
    assert own_settings(bias) == {}
    assert [is_factored(each) for each in (embedding, bias, head)] == [False, True, False]


def test_rules_of_an_earlier_optimizer_are_forgotten():
    chunk = Chunk("a", "b")
    parameter_rules.note([["a", "beta2=0.9"]], [chunk])
    parameter_rules.note([["b", "beta2=0.9"]], [chunk])
    assert [own_settings(each) for each in chunk.named.values()] == [{}, {"beta2": 0.9}]
    parameter_rules.note(None, [chunk])
    assert [own_settings(each) for each in chunk.named.values()] == [{}, {}]


@pytest.mark.parametrize("pattern", ["weight", "Layer.*", "frozen", ""])
def test_a_rule_that_matches_nothing_is_refused(pattern):
    chunk = Chunk("layer.weight", "frozen", frozen=["frozen"])
    with pytest.raises(
        UnsupportedError, match=r"matches no parameter that is trained.*'layer.weig"
    ):
        parameter_rules.note([["*", "beta1=0.5"], [pattern, "beta2=0.9"]], [chunk])


@pytest.mark.parametrize("pattern", ["*layers.1.*", "*.1.weight", "*layers.[0-3].*", "*1?.*"])
def test_checkpoints_hold_all_layers_alike(pattern):
    chunk = Chunk("decoder.layers.0.weight", "decoder.layers.1.weight")
    with pytest.raises(UnsupportedError, match="some layers or experts and not all"):
        parameter_rules.note([[pattern, "factored=no"]], [chunk])


@pytest.mark.parametrize("pattern", ["*layers.*", "*.weight", "decoder.*fc1.*", "*"])
def test_patterns_without_a_layers_number_may_be_unfactored(pattern):
    chunk = Chunk("decoder.layers.0.fc1.weight", "decoder.layers.1.fc1.weight")
    parameter_rules.note([[pattern, "factored=no"], ["*.1.*", "beta1=0.5"]], [chunk])
    assert not any(is_factored(each) for each in chunk.named.values())


@pytest.mark.parametrize(
    "pattern", ["*layers.3.*experts.2.*", "*layers.3.*weight1", "*weight2", "*experts.1*"]
)
def test_experts_too(pattern):
    experts = (f"layers.{n}.mlp.experts.{e}.fc.weight" for n in range(4) for e in range(4))
    grouped = (f"layers.{n}.fc.weight{e}" for n in range(4) for e in range(4))
    with pytest.raises(UnsupportedError, match="some layers or experts and not all"):
        parameter_rules.note([[pattern, "factored=no"]], [Chunk(*experts, *grouped)])


def test_without_rules_ranks_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", pytest.fail)
    parameter_rules.note(None, [Chunk("a")])
