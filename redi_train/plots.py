"""The figure of the training dynamics, after the paper's Figure 6, from metrics.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PANELS = [
    ("pass_at_1", "pass@1\n(share of samples)"),
    ("chosen_logps", "chosen LogPS\n(nats per token)"),
    ("rejected_logps", "rejected LogPS\n(nats per token)"),
    ("step_size", "step size\n(learning rate × gradient norm)"),
]
_WINDOW = 10
_STAGES = {"sft": ("stage 1, SFT", "#4477aa"), "redi": ("stage 2, REDI", "#cc3311")}


def plot_dynamics(metrics_paths: str | Path | Sequence[str | Path], png_path: str | Path) -> None:
    """Draw pass@1, chosen LogPS, rejected LogPS and step size against the step into one PNG.

    The lines of the files (one file of both stages, or one of each) are JSON objects with `stage`, `step` (which starts
    at 0 in each stage) and any of the keys drawn: pass_at_1, pass_at_1_se, chosen_logps, rejected_logps, step_size.
    Stage 2 continues the axis where stage 1 ends, at a dashed line. With both stages, the LogPS axes leave out the
    climb from random weights. A panel without a value says so.

    Raises ValueError when there is nothing to draw.
    """
    paths = [metrics_paths] if isinstance(metrics_paths, str | Path) else metrics_paths
    records = [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    figure = _draw(records)
    # The canvas is named, so that neither pyplot nor the user's choice of a backend comes into it.
    FigureCanvasAgg(figure).print_png(str(png_path))


def _draw(records: list[dict]) -> Figure:
    if not any(record.get(name) is not None for name, _ in _PANELS for record in records):
        raise ValueError("there is nothing to draw: no line has pass_at_1, chosen_logps, rejected_logps or step_size.")
    last_step = {stage: max((r["step"] for r in records if r["stage"] == stage), default=None) for stage in _STAGES}
    boundary = last_step["sft"] or 0
    figure = Figure(figsize=(10, 6.5), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2, sharex=True)
    for ax, (name, label) in zip(axes.flat, _PANELS, strict=True):
        drawn = {stage: [r for r in records if r["stage"] == stage and r.get(name) is not None] for stage in _STAGES}
        for stage, points in drawn.items():
            _plot(ax, points, name, *_STAGES[stage], offset=boundary if stage == "redi" else 0)
        if not any(drawn.values()):
            ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color="0.4")
        elif name == "step_size":
            # The learning rates of the stages differ by orders of magnitude. The first step of each has 0.
            ax.set_yscale("log", nonpositive="mask")
        elif name == "pass_at_1":
            ax.set_ylim(0, 1)
        elif drawn["sft"] and drawn["redi"]:
            _leave_out_the_start(ax, drawn["sft"], drawn["redi"], name)
        if None not in last_step.values():
            ax.axvline(boundary, color="0.4", linestyle="--", linewidth=1)
        ax.set_ylabel(label)
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("optimizer step")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    title = f"LogPS: pale as logged, bold the mean of the last {_WINDOW}"
    figure.legend(handles.values(), handles.keys(), title=title, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _plot(ax: Axes, points: list[dict], name: str, label: str, colour: str, offset: int) -> None:
    if not points:
        return
    steps = [offset + point["step"] for point in points]
    values = [point[name] for point in points]
    if name == "pass_at_1":
        errors = [point.get("pass_at_1_se", 0.0) for point in points]
        ax.errorbar(steps, values, yerr=errors, color=colour, label=label, marker="o", markersize=4, capsize=3)
    elif name == "step_size":
        ax.plot(steps, values, color=colour, label=label)
    else:  # batches differ more than the model changes
        ax.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
        window = min(_WINDOW, len(points))
        means = np.convolve(values, np.full(window, 1 / window), mode="valid")
        ax.plot(steps[window - 1 :], means, color=colour, label=label, linewidth=2)


def _leave_out_the_start(ax: Axes, sft: list[dict], redi: list[dict], name: str) -> None:
    """Scale the axis to stage 2 and the second half of stage 1: the climb before would flatten them."""
    values = [point[name] for point in (*sft[len(sft) // 2 :], *redi)]
    margin = 0.08 * (max(values) - min(values)) or 0.01
    ax.set_ylim(min(values) - margin, max(values) + margin)
