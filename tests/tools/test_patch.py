"""``megatron-came patch`` on small trees that look like checkouts; tests/releases has real ones."""

import shutil
import subprocess
import sys

import pytest

from megatron_came.terminal.sentences import CommandError
from megatron_came.tools import patch
from megatron_came.tools.patch import PATCHES, run
from megatron_came.versions import SUPPORTED

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")

LINE = "import megatron_came.hook  # --optimizer came\n"
# Two lines that the patch stands between, at another place than in the release, and a line that
# a careless writer would change.
SCRIPT = "import torch\r\n\n\nfrom gpt_builders import gpt_builder\n# the end, with no newline"


def make_tree(folder, *, minor="19", script=SCRIPT):
    (folder / "megatron" / "core").mkdir(parents=True)
    (folder / "megatron" / "core" / "package_info.py").write_text(
        f"# Copyright\nMAJOR = 0\nMINOR = {minor}\nPATCH = 1\nPRE_RELEASE = ''\n"
    )
    (folder / "pretrain_gpt.py").write_bytes(script.encode())
    return folder


@pytest.fixture
def tree(tmp_path):
    """A tree of core 0.19."""
    return make_tree(tmp_path / "Megatron-LM")


def contents(tree):
    return (tree / "pretrain_gpt.py").read_bytes().decode()


def status(tree, **options):
    return run(tree, **{"check": False, "undo": False, **options})[0]


def test_apply_check_and_undo(tree):
    assert status(tree, check=True) == 1
    assert contents(tree) == SCRIPT
    assert status(tree) == 0
    assert contents(tree) == SCRIPT.replace("from gpt_builders", LINE + "from gpt_builders")
    assert status(tree, check=True) == 0
    assert status(tree, undo=True) == 0
    assert contents(tree) == SCRIPT


def test_applying_or_undoing_twice_changes_nothing_more(tree):
    assert status(tree) == status(tree) == 0
    assert contents(tree).count(LINE) == 1
    assert status(tree, undo=True) == status(tree, undo=True) == 0
    assert contents(tree) == SCRIPT


def test_a_script_with_the_other_ends_of_lines_keeps_them(tmp_path):
    script = SCRIPT.replace("\r", "").replace("\n", "\r\n")
    tree = make_tree(tmp_path / "tree", script=script)
    assert status(tree) == 0
    assert contents(tree).count(LINE.replace("\n", "\r\n")) == 1
    assert status(tree, undo=True) == 0
    assert contents(tree) == script


def test_changes_of_ones_own_stay(tree):
    with (tree / "pretrain_gpt.py").open("a", newline="") as script:
        script.write("\n# mine\n")
    mine = contents(tree)
    assert status(tree) == 0
    with (tree / "pretrain_gpt.py").open("a", newline="") as script:
        script.write("# and later\n")
    assert status(tree, check=True) == 0
    assert status(tree, undo=True) == 0
    assert contents(tree) == mine + "# and later\n"


def test_a_line_put_in_by_hand_is_known(tree):
    (tree / "pretrain_gpt.py").write_text(LINE + "import torch\n")
    assert status(tree, check=True) == status(tree) == 0
    assert status(tree, undo=True) == 0
    assert contents(tree) == "import torch\n"
    with pytest.raises(CommandError, match="by hand"):
        status(tree, check=True)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
@pytest.mark.parametrize("path", sorted(PATCHES.glob("*.patch")), ids=lambda path: path.stem)
def test_git_applies_a_patch_to_the_same_bytes(path, tmp_path):
    minor = path.stem.split(".")[1]
    script = "\n" * 23 + "from gpt_builders import gpt_builder\n"
    tree = make_tree(tmp_path / "tree", minor=minor, script=script)
    assert status(tree) == 0
    ours = contents(tree)
    for options, expected in (((), ours), (("-R",), script)):
        (tree / "pretrain_gpt.py").write_text(ours if options else script)
        subprocess.run(["git", "apply", *options, str(path)], cwd=tree, check=True)
        assert contents(tree) == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"minor": "15"},
            r"is Megatron-LM 0\.15, and there are patches for 0\.16, 0\.17, .* check",
        ),
        ({"script": "import torch\n"}, "put its added line into the file by hand"),
    ],
    ids=["release", "script"],
)
def test_unknown_trees_are_refused(tmp_path, change, sentence):
    tree = make_tree(tmp_path / "tree", **change)
    with pytest.raises(CommandError, match=sentence):
        status(tree)


def test_the_command_says_a_sentence(tmp_path, tree, capsys):
    assert patch.main([str(tmp_path)]) == 2
    assert patch.main([str(tree), "--check"]) == 1
    captured = capsys.readouterr()
    assert "is no Megatron-LM checkout" in captured.err
    assert captured.out == f"megatron-came patch: core_v0.19.0.patch is not applied to {tree}.\n"


def test_there_is_a_patch_for_every_supported_release():
    found = [path.stem.removeprefix("core_v").rsplit(".", 1)[0] for path in PATCHES.glob("*.patch")]
    assert sorted(found) == sorted(SUPPORTED)


@pytest.mark.parametrize("path", sorted(PATCHES.glob("*.patch")), ids=lambda path: path.stem)
def test_patches_are_small_and_say_what_they_are(path):
    header, diff = path.read_text().split("diff --git", 1)
    for word in (path.stem, "Release:", "hunk:", "Apply:", "Undo:"):
        assert word in header
    changed = [line for line in diff.splitlines()[5:] if line[0] in "+-"]
    assert changed == ["+" + LINE.rstrip()]
    assert "--- a/pretrain_gpt.py\n" in diff


def test_the_hook_prepares_megatron_and_reports_in_a_sentence():
    program = (
        "import sys, megatron_came.launch as launch\n"
        "launch.prepare = lambda: print('prepared')\n"
        "import megatron_came.hook\n"
        "from megatron_came.megatron.errors import UnsupportedError\n"
        "raise UnsupportedError('--optimizer came does not go with it.')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "prepared\n"
    assert done.stderr == "megatron_came: --optimizer came does not go with it.\n"
    assert done.returncode == 1
