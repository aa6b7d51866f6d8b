"""plan.html: one page of what `jaxmed plan` found, with its plots in it. `write_plan(path, plan)`: plan as plan.json has it."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmed.report.page import write

COLOURS = (
    "#0c6b75",
    "#a34a00",
    "#6b3fa0",
    "#2b55a8",
    "#1d6b3a",
    "#a8242b",
    "#7a5600",
    "#5d686e",
    "#c2748a",
    "#3f8f9b",
    "#b0b7ba",
)


def write_plan(path: str | Path, plan: dict[str, Any]) -> None:
    memory, sent, time = plan["memory"], plan["sent"], plan["time"]
    classes = [(name, size, size / memory["total"]) for name, size in memory["classes"].items() if size]
    compiler = memory.get("compiler", {}).get("total", 0)
    write(
        path,
        "plan.jinja",
        title=f"Plan of a {plan['step']} step on {plan['topology']['name']}",
        subtitle=f"{plan['topology']['chips']} chips, {plan['topology']['chip']}; {_rows(plan)}",
        facts=_facts(plan),
        verdict=plan["verdict"][:1].upper() + plan["verdict"][1:],
        fits=plan["fits"],
        notices=[],
        warnings=plan["warnings"],
        flags=plan.get("flags", ""),
        classes=classes,
        total=memory["total"],
        of_chip=memory["total"] / memory["capacity"],
        compiler=compiler,
        agreement=f"{memory['model_over_compiler']:.2f}" if compiler else "",
        largest=memory["largest"],
        rows=sent["rows"][:40],
        sent_from=sent["from"],
        why=sent["why"],
        memory_plot=_memory_plot(classes, memory["capacity"], compiler),
        sent_plot=_sent_plot(sent),
        time_plot=_time_plot(time),
        sweep=plan.get("sweep", []),
        sweep_plot=_sweep_plot(plan["sweep"], memory["capacity"]) if "sweep" in plan else "",
    )


def _rows(plan: dict[str, Any]) -> str:
    """What a step has."""
    config, length = plan["config"], f"{plan['length']:,} tokens"
    if plan["unit"] == "tokens":
        return f"rows of {length}"
    volume, pieces = " × ".join(str(n) for n in config["visual"]["volume"]), config["data"]["microbatches"]
    chunks = f" in {pieces} chunks" if pieces > 1 else ""
    return f"{config['data']['batch']:,} pairs{chunks}: volumes of {volume} voxels, texts of {length}"


def _facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    time, flops, unit = plan["time"], plan["flops"], plan["unit"]
    facts = [
        ("Mesh", ", ".join(f"{name} {size}" for name, size in plan["mesh"].items())),
        ("Expected step", f"{time['expected']:.3f} s, bound by {time['bound']}"),
        ("Expected MFU", f"{time['mfu']:.0%}"),
        (f"{unit.capitalize()} a second", f"{time[f'{unit}_per_second']:,.0f}"),
        ("FLOPs over the model's", f"{flops['ratio']:.2f}"),
    ]
    if plan["sent"]["dcn"]:
        facts.append(("Between slices or nodes", f"{plan['sent']['dcn'] / 1e9:.2f} GB a device and step"))
    if plan["memory"]["host"]:
        facts.append(("Host memory", f"{plan['memory']['host'] / 1e9:.1f} GB a device"))
    if "hours" in time:
        facts.append((f"{time['steps']:,} steps", f"{time['hours']:,.1f} h, {time['chip_hours']:,.1f} chip-hours"))
    return facts + ([("Money", f"{time['money']:,.2f}")] if "money" in time else [])


def _figure(width: float, height: float, draw: Callable[[Any], None]) -> str:
    """A PNG data URI of one set of axes on white."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _memory_plot(classes: list[tuple[str, int, float]], capacity: float, compiler: int) -> str:
    def draw(axes: Any) -> None:
        left = 0.0
        for (name, size, _), colour in zip(classes, COLOURS, strict=False):
            axes.barh([0], [size / 1e9], left=left, color=colour, label=f"{name} {size / 1e9:.2f}")
            left += size / 1e9
        axes.axvline(capacity / 1e9, color="#a8242b", linestyle="--", linewidth=1.2)
        axes.text(capacity / 1e9, 0.46, " the chip's", color="#a8242b", fontsize=8, va="bottom")
        if compiler:
            axes.plot([compiler / 1e9], [0], "D", color="black", markersize=6, label="compiler's account")
        axes.set(yticks=[], xlabel="GB", xlim=(0, 1.08 * max(capacity / 1e9, left)))
        axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)

    return _figure(9.5, 2.2, draw)


def _sent_plot(sent: dict[str, Any]) -> str:
    names = sorted(set(sent["axes"]) | set(sent["least"]), key=lambda n: -sent["axes"].get(n, 0.0))

    def draw(axes: Any) -> None:
        places = range(len(names))
        axes.barh(places, [sent["axes"].get(n, 0.0) / 1e9 for n in names], color=COLOURS[0], height=0.6, label="sent")
        least = [(i, sent["least"][n] / 1e9) for i, n in enumerate(names) if n in sent["least"]]
        axes.plot([x for _, x in least], [i for i, _ in least], "D", color=COLOURS[1], label="least possible")
        axes.set(yticks=list(places), yticklabels=names, xlabel="GB a device and step")
        axes.invert_yaxis()
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))

    return _figure(9.5, 0.9 + 0.42 * max(len(names), 1), draw)


def _time_plot(time: dict[str, Any]) -> str:
    def draw(axes: Any) -> None:
        names, values = list(time["seconds"]), list(time["seconds"].values())
        colours = [COLOURS[1] if n == time["bound"] else COLOURS[0] for n in names]
        axes.barh(names, values, color=colours, height=0.6)
        axes.axvline(time["expected"], color="black", linestyle=":", linewidth=1.2)
        axes.text(time["expected"], -0.55, " expected", fontsize=8, va="top")
        axes.set(xlabel="seconds")
        axes.invert_yaxis()

    return _figure(9.5, 2.2, draw)


def _sweep_plot(candidates: list[dict[str, Any]], capacity: float) -> str:
    def draw(axes: Any) -> None:
        for policy, colour in zip(sorted({c["remat"] for c in candidates}), COLOURS, strict=False):
            some = [c for c in candidates if c["remat"] == policy]
            axes.scatter(
                [c["bytes"] / 1e9 for c in some], [c["seconds"] for c in some], s=14, color=colour, label=f"remat {policy}"
            )
        edge = sorted((c["bytes"] / 1e9, c["seconds"]) for c in candidates if c["frontier"])
        axes.step([x for x, _ in edge], [y for _, y in edge], where="post", color="black", linewidth=1, label="frontier")
        axes.axvline(capacity / 1e9, color="#a8242b", linestyle="--", linewidth=1.2, label="the chip's memory")
        axes.set(xlabel="GB a device", ylabel="expected seconds a step", xscale="log", yscale="log")
        axes.legend(fontsize=8, frameon=False)

    return _figure(9.5, 4.2, draw)
