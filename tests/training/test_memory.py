"""The memory of ranks that train, against what is predicted of them from the flags alone."""

from pathlib import Path

import pytest

from megatron_came.memory.report import Report
from tests.training.harness import Case, run
from tests.training.layouts import DO, EP, FROZEN, LAYOUTS, MODELS, NAMES, SIXTEEN_BIT, pp, tp

# One step that an overflow does not skip.
ONE = "--train-iters 1 --lr-warmup-iters 0 --initial-loss-scale 16 --came-report-memory "

# Name of the case: ranks, variant, optimizer and flags.
CASES = {
    f"{model}-{name}": (ranks, "came", "came", MODELS[model] + layout)
    for model, sizes in LAYOUTS.items()
    for ranks, layouts in sizes.items()
    for name, layout in layouts.items()
}
CASES |= {name: (2, "came", "came", flags) for name, flags in SIXTEEN_BIT.items()}
SMALLEST = "--bf16 --grad-reduce-in-bf16 --came-momentum-dtype int8 --came-main-params remainder "
OFFLOAD = "--optimizer-cpu-offload --optimizer-offload-fraction 0.5 "
CASES |= {
    name: (ranks, f"came+{variant}", "came", model + layout)
    for name, (variant, ranks, model, layout) in FROZEN.items()
}
TRAINED = CASES.keys()  # by the tests of layouts, which measure as well
CASES = CASES | {
    "adam-bf16-tp2-pp2-do": (4, "came", "adam", "--bf16 " + tp(2) + pp(2) + DO),
    "adam-bf16": (2, "came", "adam", "--bf16 --grad-reduce-in-bf16 "),
    "sgd-bf16": (2, "came", "sgd", "--bf16 "),
    "bf16-momentum": (2, "came", "came", "--bf16 --came-momentum-dtype bf16 "),
    "smallest": (2, "came", "came", SMALLEST + DO),
    # Copied to fp32: on a GPU PyTorch cannot divide bf16 by the loss scale.
    "scaled": (2, "came", "came", "--bf16 --grad-reduce-in-bf16 --loss-scale 16 " + DO),
    "offload": (2, "came", "came", "--bf16 --came-spike-guard 8 " + OFFLOAD + DO),
    "offload-all": (2, "came", "came", OFFLOAD.replace("0.5", "1") + DO),
    "offload-smallest-tp2": (2, "came", "came", SMALLEST + OFFLOAD + tp(2) + DO),
    "offload-copies": (
        2,
        "came",
        "came",
        "--bf16 --grad-reduce-in-bf16 --loss-scale 16 --came-momentum-dtype int8 " + OFFLOAD + DO,
    ),
    "offload-moe": (2, "came", "came", MODELS["moe"] + EP + "--bf16 " + OFFLOAD + DO),
    "smallest-tp2-pp2": (4, "came", "came", SMALLEST + tp(2) + pp(2) + DO),
}
CASES |= {
    "muon": (2, "came", "muon", "--bf16 "),
    "muon-tp2": (2, "came", "muon", "--bf16 --grad-reduce-in-bf16 " + tp(2) + DO),
    "muon-lion-pp2": (2, "came", "muon", "--bf16 --muon-scalar-optimizer lion " + pp(2) + DO),
    "lion-tp2": (2, "came", "lion", "--bf16 " + tp(2) + DO),
    "muon-do": (2, "came+broadcasting", "muon", "--bf16 " + DO),
    "lion-do": (2, "came+broadcasting", "lion", "--bf16 " + DO),
    "muon-moe-ep2-do": (2, "came+broadcasting", "muon", MODELS["moe"] + EP + "--bf16 " + DO),
}
QUICK = (
    "gpt2-pp2-vpp2-do-overlap",
    "gpt2-tp2-sp-do",
    "moe-tp2-sp-ep2-do",
    "bf16",
    "bf16-do-bf16-reduce",
    "adam-bf16",
    "sgd-bf16",
    "smallest",
    "scaled",
    "offload",
    "offload-smallest-tp2",
    "muon-tp2",
    "lion-tp2",
    "muon-do",
)

LOGGED = "bf16"  # to TensorBoard as well
# With random numbers, which a report must not draw.
TWICE = "--optimizer came --bf16 --hidden-dropout 0.1 --train-iters 3 --lr-warmup-iters 0 "


def _mark(names):
    return [pytest.param(name, marks=[pytest.mark.matrix] * (name not in QUICK)) for name in names]


@pytest.fixture(scope="session")
def reports(request, tmp_path_factory):
    """What each rank reported, by name of the case; of those cases alone that are asked for."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    asked = {item.callspec.params["name"] for item in items if hasattr(item, "callspec")} | {LOGGED}
    folder = tmp_path_factory.mktemp("memory")
    places = {name: folder / name for name in asked}
    if any(item.path.name == "test_layouts.py" for item in request.session.items):
        request.getfixturevalue("layouts")
        trained = request.getfixturevalue("layouts_folder") / "memory"
        places |= {name: trained / name for name in asked & TRAINED - {LOGGED}}
    seen = {}
    for ranks in (2, 4):
        cases = [
            Case(
                name,
                f"--optimizer {optimizer} {flags} {ONE} --came-memory-dir {folder / name} "
                + (f"--tensorboard-dir {folder / LOGGED} " if name == LOGGED else ""),
                variant,
            )
            for name, (where, variant, optimizer, flags) in CASES.items()
            if where == ranks and places.get(name) == folder / name
        ]
        if ranks == 2:
            report = f"--came-report-memory --came-memory-dir {folder / 'twice'} "
            cases += [Case("reporting", TWICE + report), Case("silent", TWICE)]
        if cases:
            seen.update(run(ranks, cases, folder / f"ranks{ranks}"))
    return {
        name: [Report.read(path) for path in sorted(place.glob("*.json"))]
        for name, place in places.items()
    } | {"folder": folder, "seen": seen}


def test_every_layout_is_measured():
    assert set(NAMES) <= CASES.keys()


@pytest.mark.parametrize("name", _mark(CASES))
def test_measured_memory_is_what_was_predicted(reports, name):
    assert len(reports[name]) == CASES[name][0]
    for report in reports[name]:
        assert report.problem is None
        assert report.measured.static > 0
        assert report.measured.static == pytest.approx(report.predicted.static, rel=0.01)
        assert report.measured == report.predicted
        assert (report.measured.host > 0) == name.startswith("offload")


def test_the_fullest_rank_is_printed_and_logged(reports):
    fullest = max(reports[LOGGED], key=lambda report: report.measured.total)
    log = (reports["folder"] / "ranks2" / "log").read_text()
    assert "Memory after the first optimizer step, of the fullest rank" in log
    assert f"Every rank's report: {reports['folder'] / LOGGED}" in log
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(reports["folder"] / LOGGED)).Reload()
    for kind in ("measured", "predicted"):
        (event,) = events.Scalars(f"memory-MiB/momentum-{kind}")
        assert event.value * 2**20 == pytest.approx(fullest.measured.momentum)
        assert event.step == 1


def test_a_report_changes_nothing(reports):
    assert reports["seen"]["reporting"] == reports["seen"]["silent"]
    assert len(list((reports["folder"] / "twice").iterdir())) == 2
