"""The container's files agree with each other and the project. (docker/verify.sh builds it.)"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
LOCKS = {name: (DOCKER / f"requirements-{name}.lock").read_text() for name in ("cpu", "gpu")}
FILES = {name: (DOCKER / name).read_text() for name in ("Dockerfile", "build.sh", "compose.yaml")}


def normal(name: str) -> str:
    """A package's name as the locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([\w.+]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def needed() -> set[str]:
    """What the project and its extras need, but for developers' tools and other frameworks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"]]
    lines += [line for name in extras.keys() - {"dev", "hosts", "compare"} for line in extras[name]]
    return {normal(re.split(r"[\s<>=!~;\[]", line)[0]) for line in lines}


class TestLocks:
    @pytest.mark.parametrize("device", LOCKS)
    def test_versions_are_those_that_are_tested(self, device: str) -> None:
        tested, locked = pins((ROOT / "constraints.txt").read_text()), pins(LOCKS[device])
        other = {name for name in tested.keys() & locked if tested[name] != locked[name]}
        assert other == set(), 'run "make lock"'

    def test_everything_needed_is_in_them(self) -> None:
        assert needed() - pins(LOCKS["cpu"]).keys() == set(), 'run "make lock"'
        of_the_base = {"torch", "numpy", "triton", "megatron-core"}
        assert needed() - pins(LOCKS["gpu"]).keys() - of_the_base == set(), 'run "make lock"'
        assert of_the_base & pins(LOCKS["gpu"]).keys() == set()

    @pytest.mark.parametrize("device", LOCKS)
    def test_every_package_has_hashes(self, device: str) -> None:
        lines = [line for line in LOCKS[device].splitlines() if not line.startswith("#")]
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if not line.startswith(" "):
                assert re.fullmatch(r"[\w.-]+==[\w.+]+( ; .*)? \\", line)
                assert following.startswith("    --hash=sha256:")


def test_the_bases_are_the_same_everywhere() -> None:
    found = {
        name: set(re.findall(r"([\w./]+/(?:python|pytorch)):([\w.-]+)", text))
        for name, text in FILES.items()
    }
    digests = {name: set(re.findall("@sha256:[0-9a-f]{64}", text)) for name, text in FILES.items()}
    assert found["Dockerfile"] | found["compose.yaml"] == found["build.sh"]
    assert digests["Dockerfile"] | digests["compose.yaml"] == digests["build.sh"]
    assert len(found["build.sh"]) == len(digests["build.sh"]) == 2


class TestEntrypoint:
    """The script outside of a container: what needs one is left to docker/verify.sh."""

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [DOCKER / "entrypoint.sh", *words],
            env={**os.environ, "PATH": path, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_help(self) -> None:
        usage = self.run().stdout
        words = re.findall(r"^  ([a-z][\w-]+)   ", usage, re.MULTILINE)
        source = (DOCKER / "entrypoint.sh").read_text()
        cases = re.findall(r"^    ([a-z][\w -|]*)\)", source, re.MULTILINE)
        handled = {word.strip() for case in cases for word in case.split("|")}
        assert {"gpt2-medium", "quickstart", "data", "bench", "memory", "test"} <= set(words)
        assert set(words) - {"bash"} <= handled
        for word in words:
            assert f"`{word}`" in (DOCKER / "README.md").read_text()

    def test_an_unknown_word(self) -> None:
        done = self.run("trian")
        assert done.returncode == 2
        assert done.stderr.startswith("There is no word or program trian.\nusage: ")

    def test_any_program(self) -> None:
        assert self.run("bash", "-c", "echo $((6 * 7))").stdout == "42\n"

    @pytest.mark.parametrize("layout", ["9gpus", "../llama/x", "$(id)", "1gpu.sh"])
    def test_an_unknown_layout(self, layout: str) -> None:
        done = self.run("gpt2-medium", LAYOUT=layout)
        assert done.returncode == 1
        said = f"LAYOUT must be 1gpu, 8gpus, tp2_pp2_dp2 or slurm, not {layout}.\n"
        assert done.stderr == said
        for name in ("1gpu", "8gpus", "tp2_pp2_dp2", "slurm"):
            assert (ROOT / "examples" / "gpt2_medium" / f"train_{name}.sh").exists()

    @pytest.mark.skipif(Path("/checkpoints").exists(), reason="/checkpoints is there")
    def test_folders_that_cannot_be_written(self) -> None:
        done = self.run("gpt2-medium")
        assert done.returncode == 1
        assert done.stderr.startswith("/checkpoints cannot be written by user ")


def test_healthcheck() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCKER / "healthcheck.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version = importlib.metadata.version("torch")
    assert re.fullmatch(
        rf"megatron-core [\d.]+(\+\w+)?, PyTorch {re.escape(version)}[+\w]*, \d+ GPUs;"
        r" one step of CAME changed the weights by 0\.\d+\.",
        done.stdout.splitlines()[-1],
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_no_image_without_its_kind(tmp_path: Path) -> None:
    done = subprocess.run([DOCKER / "build.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "docker/build.sh: say which image, cpu or gpu.\n"
