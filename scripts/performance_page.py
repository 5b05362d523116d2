"""Write docs/performance.md and its chart from the latest results of each kind.

    .venv/bin/python scripts/performance_page.py

The results are the JSON files that scripts/benchmarks.sh and scripts/gpu_check.py leave in
benchmarks/results.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_came.bench.shapes import shapes_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "performance.svg"
OURS = "CAME, fused"

Report = dict[str, Any]

HEAD = """\
# How fast

*Written by `scripts/performance_page.py` from the files in `benchmarks/results/`; `make benchmarks` measures again.*

A step of CAME must read the gradient three times, the momentum twice and the weights once, and write momentum and
weights: 32 bytes a parameter in fp32, 26 with bf16 momentum, 23 with int8; on a GPU 20, 16 and 14 in matrices whose
gradient and momentum stay in the last cache from pass to pass, which takes one data-parallel rank and memory slow enough
for this to pay (`sets_save_time` in `megatron_came/kernels/triton/device.py`). AdamW's 28 are the yardstick. "Floor" is
the mean of these over the parameters, "GB/s" its bytes over the median time. "Of floor" is the time of bare loops with
the same traffic, on a GPU of a copy of as many bytes, in the same run, over the step's: above 100% where a step is faster
than these loops. "Extra" is the peak of the memory taken during a step beyond what was held before it: of tensors, and on
a CPU of NumPy's arrays and Python's objects. The optimizers of one run take turns on the same parameters, so that they can
be compared; from run to run the bandwidth of a shared machine differs.

"CAME, fused" runs in kernels: Numba's on CPUs, Triton's on GPUs. **The Triton kernels {gpu}.**
"""


def latest(kind: Callable[[str], bool]) -> list[Report]:
    """The reports whose file names, less the day, are of a kind; the last day of each name."""
    by_name = {}
    for file in sorted(RESULTS.glob("*.json")):
        name = file.stem[len("2026-01-01-") :]
        if kind(name):
            by_name[name] = json.loads(file.read_text())
    return list(by_name.values())


def result(report: Report, name: str) -> Report | None:
    """What a report says of one contender."""
    return next((one for one in report["results"] if one["name"] == name), None)


def middle_runs(reports: list[Report]) -> list[Report]:
    """Of the runs of each model the one in which CAME took the median time."""
    by_parameters: dict[int, list[Report]] = {}
    for report in reports:
        by_parameters.setdefault(report["parameters"], []).append(report)
    return [
        sorted(runs, key=lambda run: result(run, OURS)["milliseconds"])[len(runs) // 2]
        for _, runs in sorted(by_parameters.items())
    ]


def is_mostly_one_matrix(report: Report) -> bool:
    """Whether a model's largest matrix holds most of its parameters."""
    shapes = shapes_of(report["model"], report["layers"] or None)
    return 2 * max(map(math.prod, shapes)) > report["parameters"]


def spread(reports: list[Report]) -> str:
    """How much the cost of a parameter differs between models."""
    costs = [result(report, OURS)["ns_per_parameter"] for report in reports]
    mean = sum(costs) / len(costs)
    return (
        f"{min(costs):.2f} to {max(costs):.2f} ns, within "
        f"{max(abs(cost / mean - 1) for cost in costs):.0%} of the mean, {mean:.2f}"
    )


def flatness(reports: list[Report]) -> str:
    """The same in a sentence, with and without models that are mostly one matrix."""
    others = [report for report in reports if not is_mostly_one_matrix(report)]
    small = " and ".join(f"`{r['model']}`" for r in reports if is_mostly_one_matrix(r))
    first, last = (reports[place]["parameters"] / 1e6 for place in (0, -1))
    return (
        f"From {first:.1f} to {last:.0f} million parameters a parameter costs {spread(reports)}; "
        f"without {small}, which are mostly an embedding, {spread(others)}."
    )


def setting(report: Report) -> str:
    """What a report was measured on."""
    machine = report["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "numba", "triton") if name in machine
    )
    return f"{machine['device']}, {machine['threads']} threads, {versions}, {report['date'][:10]}"


def peers(report: Report) -> str:
    """A table of all contenders of one run."""
    lines = [
        f"## {report['model']}, {report['parameters'] / 1e6:.1f} million parameters\n",
        f"{setting(report)}; medians, and the fastest, of {report['results'][0]['steps']} steps; "
        "the optimizers take turns.\n",
        "| | ms | fastest | ns / parameter | floor, bytes | GB/s | of floor | extra MiB"
        " | time / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = result(report, OURS)
    for one in report["results"]:
        bandwidth, floor = one["gigabytes_per_second"], one["fraction_of_floor"]
        least = one["floor_bytes_per_parameter"]
        ratio = one["milliseconds"] / ours["milliseconds"] if ours else None
        lines.append(
            f"| {one['name']} | {one['milliseconds']:.1f} | {one['fastest']:.1f} "
            f"| {one['ns_per_parameter']:.3f} "
            f"| {'-' if least is None else format(least, '.1f')} "
            f"| {'-' if bandwidth is None else format(bandwidth, '.0f')} "
            f"| {'-' if floor is None else format(floor, '.0%')} "
            f"| {one['extra_mebibytes']:.1f} "
            f"| {'-' if ratio is None else format(ratio, '.2f')} |"
        )
    return "\n".join([*lines, "", machines()]) + "\n"


def machines() -> str:
    """Says how far the ratios of one machine hold on others."""
    reports = latest(lambda n: n.startswith("cpu-peers"))

    def ratios(name: str) -> str:
        found = [
            result(report, name)["milliseconds"] / result(report, OURS)["milliseconds"]
            for report in reports
        ]
        return f"{min(found):.2f} to {max(found):.2f}"

    return (
        "**This is one machine of several, and ratios differ between them**: over "
        f"{len(reports)} runs, of which a table on a CPU shows the middle one, came_pytorch takes "
        f"{ratios('came_pytorch')} times as long as CAME, fused AdamW "
        f"{ratios('torch AdamW, fused')} times. On other machines came_pytorch took 6.3 to 13.2 "
        "times as long as the CAME of the day. Fused "
        "AdamW, which moves bytes in kernels as well, is the steadier yardstick: optimizers that "
        "make temporaries depend on how fast a machine allocates. `megatron-came bench` measures "
        "yours."
    )


def table(
    title: str, intro: str, reports: list[Report], column: str, of: Callable[..., Any]
) -> str:
    """A table of CAME and AdamW over reports."""
    lines = [
        f"## {title}\n",
        intro + "\n",
        f"| {column} | parameters, M | CAME, ms | CAME, ns / parameter | CAME's floor, bytes |"
        " AdamW, ms | collectives | MiB sent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        ours, adamw = result(report, OURS), result(report, "torch AdamW, fused")
        lines.append(
            f"| {of(report)} | {report['parameters'] / 1e6:.1f} | {ours['milliseconds']:.1f} "
            f"| {ours['ns_per_parameter']:.3f} | {ours['floor_bytes_per_parameter']:.1f} "
            f"| {'-' if adamw is None else format(adamw['milliseconds'], '.1f')} "
            f"| {ours['collectives']} | {ours['mebibytes_sent']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def chart(series: list[tuple[str, list[Report], Callable[[Report], float], str]]) -> None:
    """One panel for each series: time per step of CAME, and of AdamW where it was measured."""
    figure, axes = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.4))
    for panel, (title, reports, of, label) in zip(axes, series, strict=True):
        for name in (OURS, "torch AdamW, fused"):
            points = [(of(r), one["milliseconds"]) for r in reports if (one := result(r, name))]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.set(title=title, xlabel=label, ylabel="ms per step")
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(CHART, metadata={"Date": None})


def main() -> None:
    """Write the page and its chart."""
    runs = latest(lambda n: n.startswith("cpu-models"))
    models = middle_runs(runs)
    layers = sorted(latest(lambda n: n.startswith("cpu-layers")), key=lambda r: r["layers"])
    ranks = sorted(latest(lambda n: n.startswith("cpu-ranks")), key=lambda r: r["ranks"])
    gpu = latest(lambda n: n.startswith("nvidia") or n == "cuda-peers")
    parts = [
        HEAD.format(
            gpu="were timed on the GPU named below"
            if gpu
            else "have not been timed, see [gpu.md](gpu.md)",
        )
    ]
    of_peers = middle_runs(latest(lambda n: n.startswith("cpu-peers")))
    parts += [peers(report) for report in (*gpu, *of_peers)]
    chart(
        [
            ("Models", models, lambda r: r["parameters"] / 1e6, "million parameters"),
            ("Layers of 768", layers, lambda r: r["layers"], "layers"),
            ("One rank of many (simulated)", ranks, lambda r: r["ranks"], "data-parallel ranks"),
        ]
    )
    parts.append(
        "## Growth\n\n![Time per step against parameters, layers and ranks](performance.svg)\n"
    )
    parts.append(
        table(
            "Models",
            f"{flatness(models)} The "
            f"middle one of {len(runs) // len(models)} runs, minutes apart: {setting(models[0])}.",
            models,
            "model",
            lambda r: f"{r['model']}, {r['layers']} layers" if r["layers"] else r["model"],
        )
    )
    parts.append(
        table(
            "Layers",
            f"GPT-2 small with more and fewer layers: {setting(layers[0])}.",
            layers,
            "layers",
            lambda r: r["layers"],
        )
    )
    parts.append(
        table(
            "Ranks",
            "**Simulated**: what one rank of GPT-2 medium's distributed optimizer computes, with "
            "PyTorch's fake process group in place of the others; collectives are counted and cost "
            f"nothing. {setting(ranks[0])}. Factors are whole on every rank, so that their share "
            "of the time, and what is sent, do not shrink with the number of ranks. Parameters are the "
            "model's, ns a parameter counts those that the rank updates.",
            ranks,
            "ranks",
            lambda r: r["ranks"],
        )
    )
    for report in latest(lambda n: n.endswith("iteration")):
        lines = [
            f"| {one['optimizer']} | {one['milliseconds']:.0f} "
            f"| {one['forward_milliseconds']:.0f} | {one['backward_milliseconds']:.0f} "
            f"| {one['step_milliseconds']:.1f} | {one['step_milliseconds'] / one['milliseconds']:.0%} |"
            for one in report["iterations"]
        ]
        parts.append(
            "## A whole iteration of Megatron\n\n"
            f"{report['model']}, one rank, micro-batch 1, flags `{' '.join(report['flags'])}`; "
            f"{setting(report)}; medians of {report['iterations'][0]['iterations']}.\n\n"
            "On a CPU Megatron's `adam` is PyTorch's AdamW, not fused; on a GPU its timers wait at the "
            "beginning and the end of each part.\n\n"
            "| optimizer | ms an iteration | forward | backward | the optimizer's step "
            "| its share |\n|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
        )
    PAGE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
