"""The scripts that find a Python and build ``.venv``."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pythons(tmp_path: Path) -> dict[str, str]:
    """An environment in which the only programs are the basic ones and fake interpreters."""
    for tool in ("bash", "env", "grep", "ls"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    return {"PATH": str(tmp_path), "HOME": str(tmp_path), "LC_ALL": "C"}


def fake_python(path: Path, answer: str, status: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{answer}"\nexit {status}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def find_python(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # System-wide interpreters are no business of the test: a copy of the script without them.
    script = Path(environment["HOME"]) / "find_python.sh"
    lines = (ROOT / "scripts" / "find_python.sh").read_text()
    script.write_text(lines.replace(" /usr/", " /none/").replace(" /opt/", " /none/"))
    return subprocess.run(
        ["/bin/bash", str(script)], env=environment, capture_output=True, text=True, check=False
    )


class TestFindPython:
    def test_the_one_on_the_path(self, pythons: dict[str, str], tmp_path: Path) -> None:
        fake_python(tmp_path / "python3", "3.13 /right")
        assert find_python(pythons).stdout == "/right\n"

    def test_the_best_tested_version_comes_first(
        self, pythons: dict[str, str], tmp_path: Path
    ) -> None:
        fake_python(tmp_path / "python3.13", "3.13 /newer")
        fake_python(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3", "3.12 /right")
        assert find_python(pythons).stdout == "/right\n"

    def test_a_shim_that_fails_is_passed_over(
        self, pythons: dict[str, str], tmp_path: Path
    ) -> None:
        fake_python(tmp_path / "python3.12", "command not found", status=127)
        fake_python(tmp_path / "python3", "3.11 /old")
        fake_python(tmp_path / "roots" / "versions" / "3.12.1" / "bin" / "python3", "3.12 /right")
        environment = {**pythons, "PYENV_ROOT": str(tmp_path / "roots")}
        assert find_python(environment).stdout == "/right\n"

    def test_none(self, pythons: dict[str, str], tmp_path: Path) -> None:
        fake_python(tmp_path / "python3", "3.11 /old")
        found = find_python(pythons)
        assert found.returncode == 1
        assert found.stdout == ""
        assert found.stderr.startswith("No Python 3.12 or 3.13 with venv was found: install one")
        assert found.stderr.count("\n") == 1

    def test_the_one_that_is_named(self, pythons: dict[str, str], tmp_path: Path) -> None:
        named = fake_python(tmp_path / "named" / "python", "3.13 /right")
        fake_python(tmp_path / "python3.12", "3.12 /other")
        assert find_python({**pythons, "PYTHON": str(named)}).stdout == "/right\n"

    @pytest.mark.parametrize("answer", ["3.11 /old", ""])
    def test_the_one_that_is_named_must_do(
        self, pythons: dict[str, str], tmp_path: Path, answer: str
    ) -> None:
        named = fake_python(tmp_path / "named" / "python", answer)
        fake_python(tmp_path / "python3.12", "3.12 /other")
        found = find_python({**pythons, "PYTHON": str(named)})
        assert found.returncode == 1
        assert found.stderr.startswith(f"PYTHON={named} is not a working Python 3.12 or 3.13")


class TestMakeVenv:
    """The script in a copy of its own, with an interpreter that only pretends."""

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        (tmp_path / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "make_venv.sh", tmp_path / "scripts")
        fake_python(tmp_path / "scripts" / "find_python.sh", str(tmp_path / "python"))
        installs = tmp_path / "installs"
        (tmp_path / "python").write_text(
            "#!/bin/sh\n"
            f'[ "$2" = pip ] && echo "$@" >> {installs}\n'
            f'[ "$2" = venv ] && mkdir -p "$3/bin" && cp {tmp_path}/python "$3/bin/python"\n'
            f'[ "$2" = pip ] && [ -e {tmp_path}/offline ] && echo "ERROR: no network" && exit 1\n'
            "exit 0\n"
        )
        (tmp_path / "python").chmod(0o755)
        for name in ("pyproject.toml", "constraints.txt"):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (1e9, 1e9))
        # Plenty of space, whatever the disk of the test holds.
        fake_python(tmp_path / "bin" / "df", "disk\nsize 1 1 99999999 1 /")
        return tmp_path

    def make(self, tree: Path, torch: str = "") -> subprocess.CompletedProcess[str]:
        path = f"{tree / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "TORCH": torch}
        return subprocess.run(
            [tree / "scripts" / "make_venv.sh"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def installs(self, tree: Path) -> int:
        return len((tree / "installs").read_text().splitlines())

    def test_it_is_built_once(self, tree: Path) -> None:
        assert self.make(tree).stdout.endswith(".venv is ready.\n")
        assert self.make(tree).stdout == ""
        assert self.installs(tree) == 1

    def test_changed_dependencies_are_installed(self, tree: Path) -> None:
        self.make(tree)
        os.utime(tree / "constraints.txt", (4e9, 4e9))
        self.make(tree)
        assert self.installs(tree) == 2

    def test_another_pytorch_is_installed(self, tree: Path) -> None:
        (tree / "constraints.txt").write_text("numpy==2\ntorch==2.13.0\ntriton==3.7.1\n")
        os.utime(tree / "constraints.txt", (1e9, 1e9))
        used = tree / ".venv" / "constraints.txt"
        for number, (version, constraints) in enumerate(
            {
                "": "numpy==2\ntorch==2.13.0\ntriton==3.7.1\n",
                "newest": "numpy==2\n",
                "2.14.1": "numpy==2\ntorch==2.14.1\n",
                "pinned": "numpy==2\ntorch==2.13.0\ntriton==3.7.1\n",
            }.items(),
            start=1,
        ):
            assert self.make(tree, version).returncode == 0
            assert self.make(tree, version).stdout == ""
            assert self.installs(tree) == number
            assert used.read_text() == constraints

    def test_no_other_word_names_a_pytorch(self, tree: Path) -> None:
        failed = self.make(tree, "nightly")
        assert failed.returncode == 1
        assert failed.stderr.startswith("TORCH=nightly is not allowed: use newest, a version")

    def test_a_failed_build_does_not_count(self, tree: Path) -> None:
        (tree / "offline").touch()
        failed = self.make(tree)
        assert failed.returncode == 1
        assert failed.stderr.startswith("Installing the packages failed")
        assert failed.stderr.endswith("ERROR: no network\n")
        (tree / "offline").unlink()
        (tree / ".venv" / "left behind").touch()
        assert self.make(tree).returncode == 0
        assert not (tree / ".venv" / "left behind").exists()

    def test_somebody_elses_environment_is_left_alone(self, tree: Path) -> None:
        (tree / ".venv").mkdir()
        refused = self.make(tree)
        assert refused.returncode == 1
        assert 'was not made by "make venv"' in refused.stderr

    def test_a_full_disk(self, tree: Path) -> None:
        fake_python(tree / "bin" / "df", "disk\nsize 1 1 1048576 1 /")
        refused = self.make(tree)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"The packages need 8 GiB and {tree} has 1 GiB free")
