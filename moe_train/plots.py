"""Pictures of a run, drawn from its metrics.jsonl alone. `python -m moe_train.plots RUN` draws loss.png and experts.png again.

Shapes: N moments, E experts.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moe_train.files import write_atomically
from moe_train.metrics import METRICS_FILE, Row, read_rows

LOSS_FILE = "loss.png"
EXPERTS_FILE = "experts.png"

Floats = NDArray[np.float64]

_MOMENTS = 150  # columns of a heatmap: as many as a panel can show
_COLOURS = "RdBu_r"
_NORM = Normalize(-2, 2)  # of log2(load / even load)


def draw(folder: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Draw what the run in `folder` has recorded so far; returns the files written, and says where there is nothing to draw."""
    rows = read_rows(folder)
    figures = {LOSS_FILE: _loss_figure(rows, folder.name), EXPERTS_FILE: _experts_figure(rows, folder.name)}
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        write_atomically(folder / name, image.getvalue())
        written.append(folder / name)
    if not written:
        say(f"{folder / METRICS_FILE}: nothing to plot yet")
    return written


def _loss_figure(rows: list[Row], title: str) -> Figure | None:
    """Training loss, and each evaluated split in nats per token (left) and bits per byte (right)."""
    training = [row for row in rows if row.get("kind") == "train"]
    splits = {row["split"]: None for row in rows if row.get("kind") == "eval" and "split" in row}
    if not training and not splits:
        return None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    _draw_training(axes, training)
    for colour, split in zip(("C1", "C2", "C3", "C4", "C5") * len(splits), splits, strict=False):
        _draw_split(axes, [row for row in rows if row.get("kind") == "eval" and row.get("split") == split], split, colour)
    _add_bits_axis(axes, rows)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=f"Loss of {title}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def _draw_training(axes: Axes, rows: list[Row]) -> None:
    # Without the router's losses, where the trainer says them apart: that is what compares with an evaluation.
    steps, losses = _curve(rows, "cross_entropy" if any("cross_entropy" in row for row in rows) else "loss")
    smooth = len(steps) >= 40
    label = "training, each row" if smooth else "training"
    axes.plot(steps, losses, color="C0", alpha=0.35 if smooth else 1.0, linewidth=1.2, marker=_marker(losses), label=label)
    if smooth:
        width = len(steps) // 50 * 2 + 1
        axes.plot(steps, _running_mean(losses, width), color="C0", linewidth=1.8, label=f"training, mean of {width} rows")


def _draw_split(axes: Axes, rows: list[Row], split: str, colour: str) -> None:
    steps, losses = _curve(rows, "loss")
    last = rows[-1]
    text = f"{split}, last {_number(last.get('loss'))} nats per token"
    if isinstance(last.get("bits_per_byte"), int | float):
        text += f" = {_number(last['bits_per_byte'])} bits per byte"
    axes.plot(steps, losses, color=colour, marker="o", markersize=5, linewidth=1.5, label=text)


def _add_bits_axis(axes: Axes, rows: list[Row]) -> None:
    """A right axis in bits per byte. Bytes per token belong to the text, so it is exact for the last evaluation only."""
    known = [row for row in rows if row.get("kind") == "eval" and row.get("bits_per_byte") and row.get("loss")]
    if known:
        ratio = known[-1]["bits_per_byte"] / known[-1]["loss"]
        right = axes.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio))
        right.set_ylabel("bits per byte")


def _curve(rows: list[Row], name: str) -> tuple[Floats, Floats]:
    """Steps and values; a value that was not finite is a gap."""
    values = [row.get(name) for row in rows]
    return np.array([row["step"] for row in rows], float), np.array([math.nan if v is None else v for v in values], float)


def _running_mean(values: Floats, width: int) -> Floats:
    """Mean of the `width` values around each that are finite; narrower at the start, where the loss falls fast, cut at the end."""
    finite = np.isfinite(values)
    sums, counts = (np.cumsum(np.pad(x, (1, 0))) for x in (np.where(finite, values, 0.0), finite.astype(float)))
    at = np.arange(len(values))
    half = np.minimum(width // 2, at)
    first, end = at - half, np.minimum(at + half + 1, len(values))
    count = counts[end] - counts[first]
    return np.where(count > 0, (sums[end] - sums[first]) / np.maximum(count, 1.0), math.nan)


def _marker(values: Floats) -> str | None:
    """A curve of one point is invisible without a marker."""
    return "o" if len(values) == 1 else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _experts_figure(rows: list[Row], title: str) -> Figure | None:
    """One heatmap per layer: steps across, experts down, colour the expert's load relative to an even one."""
    rows = [row for row in rows if row.get("kind") == "train" and row.get("layers")]
    if not rows:
        return None
    names = list(rows[-1]["layers"])
    columns, lines = _grid(len(names))
    figure = Figure(figsize=(max(2.3 * columns, 7.5) + 1.0, max(2.0 * lines, 3.2) + 0.9), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for i, panel in enumerate(panels.flat):
        if i < len(names):
            _draw_layer(panel, rows, names[i])
            panel.tick_params(labelsize=7, labelleft=i % columns == 0, labelbottom=i + columns >= len(names))
        else:
            panel.set_visible(False)
    figure.suptitle(f"Expert load of {title}")
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(ScalarMappable(_NORM, _COLOURS), ax=panels, extend="both", aspect=30, pad=0.01)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "even", "2x", "4x"])
    bar.set_label("expert's share of tokens / even share (black: none)")
    return figure


def _grid(panels: int) -> tuple[int, int]:
    """Columns and lines that leave the fewest holes, and of those the one nearest to a screen's shape."""
    root = math.sqrt(panels)
    choices = range(math.ceil(root), math.ceil(2 * root) + 1)
    columns = min(choices, key=lambda n: (-panels % n, abs(n - 1.4 * root)))
    return columns, math.ceil(panels / columns)


def _draw_layer(panel: Axes, rows: list[Row], name: str) -> None:
    edges, loads = _loads(rows, name)
    image = np.ma.masked_invalid(np.log2(loads, where=loads > 0, out=np.full_like(loads, np.nan)))
    panel.set_facecolor("black")
    experts = np.arange(loads.shape[0] + 1) - 0.5
    panel.pcolormesh(edges, experts, image, cmap=_COLOURS, norm=_NORM, rasterized=True)
    panel.set_ylim(loads.shape[0] - 0.5, -0.5)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    panel.set_title(f"layer {name}, max {loads[:, -1].max():.2f}x at the end", fontsize=8)


def _loads(rows: list[Row], name: str) -> tuple[Floats, Floats]:
    """Step edges [N + 1] and loads [E, N] of a layer, 1 = even; neighbouring rows are added up where there are too many."""
    counts = [(row["step"], row["layers"][name]["tokens_per_expert"]) for row in rows if name in row["layers"]]
    width = len(counts[-1][1])
    counts = [(step, count) for step, count in counts if len(count) == width]
    groups = np.array_split(np.arange(len(counts)), min(len(counts), _MOMENTS))
    steps = np.array([step for step, _ in counts], float)
    table = np.array([count for _, count in counts], float)
    loads = np.stack([table[group].sum(0) for group in groups], axis=1)
    loads *= width / np.maximum(loads.sum(0), 1.0)
    ends = np.array([steps[group[-1]] for group in groups])
    gap = ends[1] - ends[0] if len(ends) > 1 else max(ends[0], 1.0)
    return np.concatenate([[max(ends[0] - gap, 0.0)], ends]), loads


def main(words: list[str]) -> int:
    """Command line: draw each run folder named."""
    parser = argparse.ArgumentParser(prog="python -m moe_train.plots", description=f"Redraw {LOSS_FILE} and {EXPERTS_FILE}.")
    parser.add_argument("run", nargs="+", type=Path, help="run folder, which holds metrics.jsonl")
    for folder in parser.parse_args(words).run:
        if not folder.is_dir():
            print(f"{folder}: no such run folder; name one that holds {METRICS_FILE}", file=sys.stderr)
            return 2
        for path in draw(folder):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
