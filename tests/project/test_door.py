"""What a newcomer meets first: hooks, workflow, issue forms, citation, the package's words."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from megatron_came import __version__

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path):
    # BaseLoader: "on" stays a word, a version a text.
    return yaml.load((ROOT / path).read_text(), Loader=yaml.BaseLoader)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_workflow_runs_what_a_change_must_pass():
    workflow = read(".github/workflows/check.yml")
    assert {"push", "pull_request", "schedule"} <= set(workflow["on"])
    job = workflow["jobs"]["check"]
    assert {"run": ".ci/run"} in job["steps"]
    assert "'newest' || 'pinned'" in job["env"]["TORCH"]
    versions = job["strategy"]["matrix"]["python"]
    stated = {line.rpartition(" ")[2] for line in project()["classifiers"] if "Python ::" in line}
    assert set(versions) == stated
    low, high = re.findall(r"3\.(\d+)", project()["requires-python"])
    assert versions == [f"3.{minor}" for minor in range(int(low), int(high))]


def test_hooks_run_what_make_check_runs():
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    recipe = re.search(r"^check: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[
        1
    ]
    ran = re.findall(r"\$\(BIN\)/([a-z]+(?: format| check)?)", recipe)
    entries = [
        re.match(r"[a-z]+(?: format| check)?", hook["entry"].removeprefix(".venv/bin/"))[0]
        for hook in hooks.values()
    ]
    assert entries == ran
    checked = re.search(r"shellcheck -x (.*)", recipe)[1].split()
    scripts = {path for pattern in checked for path in ROOT.glob(pattern)}
    pattern = re.compile(hooks["shellcheck"]["files"])
    assert scripts
    assert all(pattern.search(path.relative_to(ROOT).as_posix()) for path in scripts)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_that_can_be_filled_in(path):
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in fields)
    assert {"versions", "launch", "layout", "first-lines"} <= set(names)
    assert ("losses" in names) == (path.stem == "wrong_numbers")


def test_the_citation_names_this_version_and_the_paper():
    citation = read("CITATION.cff")
    assert citation["version"] == __version__
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in project()["authors"]
    ]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in project()["urls"]["Paper"]
