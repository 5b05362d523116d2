"""The patched ``pretrain_gpt.py`` of real checkouts against the launcher and the unpatched one."""

import os
import re
import subprocess
import sys

import pytest

from megatron_came.tools import patch
from tests.releases.places import checkout, copy_of
from tests.training.harness import MODEL, ROOT, free_port

TAGS = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0", "core_v0.20.0")
FLAGS = "--tensor-model-parallel-size 2 --use-distributed-optimizer --log-interval 1 "
NUMBERS = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) .*?grad norm: (\S+)")


def train(search_path, *start):
    """Train on two ranks; return iterations, losses and gradient norms as they are printed."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), *map(str, start)]
    done = subprocess.run(
        [sys.executable, *command, *MODEL.split(), *FLAGS.split(), "--optimizer", "came"],
        # The tree comes first by itself, as the script's own folder.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MEGATRON_CAME_CPU": "1",
            "PYTHONPATH": os.pathsep.join(map(str, [*search_path[1:], ROOT])),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return NUMBERS.findall(log)


@pytest.fixture(scope="module", params=TAGS)
def runs(request, tmp_path_factory):
    """What a launch with and one without the patch print, and the script's bytes along the way."""
    search_path = copy_of(request.param, tmp_path_factory.mktemp("tree"))
    tree = search_path[0]
    script = tree / "pretrain_gpt.py"
    contents = [script.read_bytes()]
    launched = train(search_path, "-m", "megatron_came.launch", script)
    statuses = [patch.main([str(tree), "--check"]), patch.main([str(tree)])]
    contents.append(script.read_bytes())
    patched = train(search_path, script)
    statuses += [
        patch.main([str(tree), *options]) for options in ([], ["--check"], ["--undo"], ["--check"])
    ]
    contents.append(script.read_bytes())
    print(f"\n{request.param}: losses {patched[0][1]} ... {patched[-1][1]}")
    return {
        "launched": launched,
        "patched": patched,
        "statuses": statuses,
        "contents": contents,
    }


def test_the_patched_script_trains_as_the_launcher_does(runs):
    assert len(runs["patched"]) == 20
    assert float(runs["patched"][-1][1]) < float(runs["patched"][0][1]) - 1
    assert runs["patched"] == runs["launched"]


def test_the_patch_adds_one_line_and_goes_without_trace(runs):
    assert runs["statuses"] == [1, 0, 0, 0, 0, 1]
    before, patched, after = runs["contents"]
    assert before == after
    added = set(patched.splitlines()) - set(before.splitlines())
    assert added == {b"import megatron_came.hook  # --optimizer came"}
    assert len(patched.splitlines()) == len(before.splitlines()) + 1


@pytest.mark.parametrize("tag", TAGS)
def test_the_patch_fits_the_checkout(tag):
    found = patch.find_patch(checkout(tag))
    assert found.stem == tag
    script = (checkout(tag) / "pretrain_gpt.py").read_bytes()
    applied, patched = patch.switched(script, found)
    assert (applied, patch.switched(patched, found)) == (False, (True, script))
