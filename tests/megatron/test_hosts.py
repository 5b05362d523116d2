"""CAME where Megatron's own training loop is not: built as hosts do, the same bit for bit.

Each way runs in a process of its own (``tests/support/host_worker.py``), with megatron.core on the
CPU. With verl's and Megatron-Bridge's packages: ``tests/releases/test_frameworks.py``.
"""

import sys
from functools import partial
from types import SimpleNamespace

import pytest

from megatron_came.megatron.checkpoints.loading import agreed, with_sentences
from tests.support.running import run_python, seen_by_host_worker

WAYS = [
    "plain",
    "late",
    "own_first",
    "another_before",
    "another_before_in_the_loop",
    "another_after",
    "slime",
]


@pytest.fixture(scope="module")
def seen():
    return seen_by_host_worker("installed", *WAYS, "checkpoint", "adams_checkpoint", "offload")


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_came_of_the_launchers(seen, way):
    expected = {key: value for key, value in seen["installed"].items() if key != "said"}
    assert expected["optimizer"] == "CAME"
    assert {key: seen[way].get(key) for key in expected} == expected


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("another")])
def test_another_packages_wrapper_is_called_once(seen, way):
    assert seen[way]["calls"] == ["called"]
    said = [line for line in seen[way]["said"] if "has been replaced already, by other_" in line]
    assert len(said) == (way != "another_after")


def test_what_is_loaded_may_be_given_by_name(monkeypatch):
    """As slime does."""
    run = SimpleNamespace(optimizer="adam", override_opt_param_scheduler=False)
    training = SimpleNamespace(get_args=lambda: run)
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    load = partial(with_sentences, lambda *args, **kwargs: (*args, kwargs))
    given = {"ddp_model": [], "optimizer": "adam", "opt_param_scheduler": "schedule"}
    assert load(**given, strict=False) == ([], "adam", "schedule", {"strict": False})


def test_a_hosts_checkpoint_is_resumed_bit_for_bit(seen):
    assert seen["checkpoint"]["resumed"] == seen["checkpoint"]["weights"]


def test_a_hosts_checkpoint_of_another_optimizer_is_refused(seen):
    error = seen["adams_checkpoint"]["error"]
    assert "the checkpoint lacks optimizer.state.exp_avg_sq_row.embedding" in error
    assert "--no-load-optim to start CAME afresh from its weights" in error


@pytest.mark.parametrize("kind", ["fp32", "bf16", "remainders", "fp32 whole", "bf16 whole"])
def test_what_left_a_gpu_to_inference_comes_back_bit_for_bit(seen, kind):
    found = seen["offload"][kind]
    assert found["moved"] == found["kept"]
    # Momentum and factors, and, where they are not the model's own weights, main weights.
    mains = found["parameters"] if "bf16" in kind or kind == "remainders" else 0
    assert found["elements"] - found["parameters"] - mains in range(1000, 1200)


def test_the_import_is_light():
    code = (
        "import sys, megatron_came; "
        "assert not {'torch', 'numpy', 'megatron'} & {name.partition('.')[0] for name in "
        "sys.modules}, sorted(sys.modules)"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_a_megatron_that_is_not_known_is_left_alone(tmp_path):
    core = tmp_path / "megatron" / "core"
    (core / "optimizer").mkdir(parents=True)
    (core / "__init__.py").write_text("")
    (core / "package_info.py").write_text("__version__ = '9.0.0'\n")
    (core / "optimizer" / "__init__.py").write_text("def get_megatron_optimizer(): return 1\n")
    code = (
        "import megatron_came, sys, megatron.core.optimizer as found; "
        "assert found.get_megatron_optimizer() == 1; "
        "assert type(found.__loader__).__module__ != 'megatron_came.waiting'; "
        "assert not any('waiting' in type(each).__module__ for each in sys.meta_path)"
    )
    result = run_python("-c", code, PYTHONPATH=f"{tmp_path}:{sys.path[0]}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("does not know Megatron 9.0.0") == 1


def test_finders_of_others_are_lived_with():
    """One that asks all others as ours does, one of an old package, and ours a second time."""
    code = """
import importlib, sys
import megatron_came

class Asking:
    def find_spec(self, name, path=None, target=None):
        others = [each.find_spec for each in sys.meta_path if each is not self]
        found = (find(name, path, target) for find in others)
        return next(filter(None, found), None) if name.startswith("megatron") else None

class Old:
    find_module = None

importlib.reload(megatron_came)
ours = [each for each in sys.meta_path if "waiting" in type(each).__module__]
assert len(ours) == 1
sys.meta_path.insert(0, Asking())
import megatron_came.rules
del sys.meta_path[0]
sys.meta_path.append(Old())
try:
    import megatron_came.lacking
except ModuleNotFoundError:
    pass
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_a_host_loads_without_a_training_loop(monkeypatch):
    """As with the package of megatron-core 0.16, which has none."""
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    assert agreed(lambda folder: folder, "folder") == "folder"
