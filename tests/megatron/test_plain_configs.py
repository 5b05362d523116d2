"""Hosts that build ``OptimizerConfig(optimizer="came")`` themselves: which settings it means."""

from types import SimpleNamespace

import pytest
from megatron.core.optimizer import OptimizerConfig

from megatron_came.core.hyperparameters import Hyperparameters
from megatron_came.megatron import builder
from megatron_came.megatron.arguments import FLAGS, use_came
from megatron_came.megatron.config import CameOptimizerConfig
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.rules import refuse
from megatron_came.rules import name_of
from megatron_came.voice import say_once


@pytest.fixture(autouse=True)
def silence():
    """Nothing has been said yet."""
    say_once.cache_clear()


def plain(**settings):
    return OptimizerConfig(**{"optimizer": "came", "lr": 1e-3, **settings})


def test_without_settings_it_means_the_defaults(capsys):
    made = CameOptimizerConfig.from_plain(plain(), {})
    assert (made.came, made.kernels, made.momentum_dtype) == (Hyperparameters(), "auto", "fp32")
    assert made.optimizer == "came"
    assert made.lr == 1e-3
    assert capsys.readouterr().out.count("trains with CAME's defaults") == 1


def test_settings_are_given_as_flags_are_named(capsys):
    made = CameOptimizerConfig.from_plain(
        plain(came_beta2=0.99, came_momentum_dtype="int8", came_eps1=None), {}
    )
    assert made.came == Hyperparameters(beta2=0.99)
    assert made.momentum_dtype == "int8"
    said = capsys.readouterr().out
    assert "with came_beta2 0.99, came_momentum_dtype int8, and otherwise" in said


def test_an_attribute_counts_more_than_an_argument():
    config = plain()
    config.came_beta2 = 0.99
    args = {"came_beta2": 0.5, "came_beta3": 0.999, "seed": 7}
    made = CameOptimizerConfig.from_plain(config, args)
    assert (made.came, made.seed) == (Hyperparameters(beta2=0.99, beta3=0.999), 7)


def test_every_flag_of_cames_is_a_setting():
    settings = {name_of(flag): each.get("default") for flag, each in FLAGS.items()}
    del settings["came_no_verify"]  # of the training loop's checkpoints
    CameOptimizerConfig.from_plain(plain(**settings), {})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"came_beta": 0.9}, "has came_beta, which is no setting of CAME: these are came_beta1,"),
        ({"came_beta2": 1.5}, r"OptimizerConfig's came_beta2 1.5 is not allowed: it must be in"),
        ({"came_beta2": "0.9"}, r"OptimizerConfig's came_beta2 0.9 is not allowed"),
        ({"came_momentum_dtype": "fp8"}, "--came-momentum-dtype fp8 is not allowed: use fp32 or"),
        ({"decoupled_weight_decay": False}, "has decoupled weight decay only"),
        ({"decoupled_weight_decay": 0}, "has decoupled weight decay only"),
        (
            {"optimizer_cpu_offload": True, "use_distributed_optimizer": False},
            "--optimizer-cpu-offload needs the distributed optimizer",
        ),
    ],
)
def test_what_is_wrong_is_said(settings, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        CameOptimizerConfig.from_plain(plain(**settings), {}).finalize()


def test_settings_of_came_in_another_optimizers_configuration_are_refused():
    with pytest.raises(UnsupportedError, match="has the optimizer sgd: give it"):
        plain(optimizer="sgd", came_beta2=0.9)


def test_what_megatrons_arguments_have_is_refused_where_it_is_built(monkeypatch):
    monkeypatch.setattr(builder, "arguments", lambda: {"yaml_cfg": "settings.yaml"})
    config = CameOptimizerConfig.from_plain(plain(), {})
    with pytest.raises(UnsupportedError, match=r"--yaml-cfg settings\.yaml"):
        refuse(builder.settings_of_model(config, [SimpleNamespace()]))


def test_past_megatrons_builder_it_is_refused():
    for config in (plain(), CameOptimizerConfig()):
        with pytest.raises(UnsupportedError, match="another package has called what that calls"):
            builder.with_came_for_groups(lambda config: config, config)


def test_use_came_takes_adams_place(capsys):
    args = SimpleNamespace(optimizer="adam", came_beta2=0.99, bf16=True, fp16=False)
    use_came(args)
    assert (args.optimizer, args.came_beta2, args.came_beta3) == ("came", 0.99, 0.9999)
    assert "CAME takes its place" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer": "muon"}, "--optimizer muon, which is not sharded as CAME is"),
        ({"came_beta1": 2.0}, "--came-beta1 2.0 is not allowed"),
        (
            {"optimizer_cpu_offload": True},
            "--optimizer-cpu-offload needs the distributed optimizer",
        ),
    ],
)
def test_use_came_says_what_is_wrong(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        use_came(SimpleNamespace(**{"optimizer": "adam", **settings}))
