"""What README and docs name exists."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_came import __version__
from megatron_came.core.hyperparameters import Hyperparameters

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(
    page.read_text() for page in (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
)
CODE = re.findall(r"`([^`\n]+)`", PAGES) + re.findall(r"```\w*\n(.*?)```", PAGES, re.DOTALL)


def test_paths_exist():
    paths = {
        path
        for code in CODE
        for path in re.findall(r"\b(?:tests|megatron_came|docs|examples|docker)/[\w/.-]+", code)
    }
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_make_targets_exist():
    targets = {target for code in CODE for target in re.findall(r"\bmake ([a-z][\w-]*)", code)}
    assert {"quickstart", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_modules_exist():
    modules = {module for code in CODE for module in re.findall(r"-m (megatron_came[\w.]*)", code)}
    assert modules
    assert [
        name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).exists()
    ] == []


def test_flags_and_defaults_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `(--came-[\w-]+)` \| (\S+) \|", README, re.MULTILINE))
    names = {"--came-" + f.name.replace("_", "-"): f.default for f in fields(Hyperparameters)}
    found = {flag: rows[flag] if rows[flag] == "off" else float(rows[flag]) for flag in names}
    assert found == {flag: "off" if value is False else value for flag, value in names.items()}


def test_the_changelog_has_this_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_links_lead_to_files():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
    dead = [
        (page.name, link)
        for page in pages
        if page.name != "CHANGELOG.md"
        for link in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert dead == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert [page for page in pages if f"]({page})" not in index] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "README.md", ".ci/run"])
def test_usual_files(name):
    assert (ROOT / name).stat().st_size
