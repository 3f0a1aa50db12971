"""Pictures drawn from metrics.jsonl alone: there, of a readable size, not blank, and showing what the rows say."""

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from moe_train.plots import _grid, _loads, _loss_figure, _running_mean, draw, main


def write(folder: Path, rows: list[dict]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def training(steps: range, layers: int = 2, experts: int = 4) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "kind": "train",
            "step": step,
            "loss": 1.0 + 4.0 / step,
            "layers": {
                str(i): {"tokens_per_expert": rng.multinomial(512, [1 / experts] * experts).tolist()} for i in range(layers)
            },
        }
        for step in steps
    ]


def evaluation(step: int, loss: float, split: str = "valid") -> dict:
    return {"kind": "eval", "step": step, "split": split, "loss": loss, "bits_per_byte": loss / math.log(2)}


def assert_picture(path: Path) -> None:
    image = matplotlib.image.imread(path)[..., :3]
    assert min(image.shape[:2]) >= 400
    assert len(np.unique(image @ np.array([1.0, 256.0, 65536.0]))) > 20  # more than a frame on white
    assert 0.02 < (image < 0.9).any(-1).mean() < 0.98


@pytest.mark.parametrize(("layers", "experts"), [(4, 8), (24, 16)])
def test_both_pictures_are_drawn(tmp_path, layers, experts):
    rows = [*training(range(10, 300, 10), layers, experts), evaluation(100, 2.0), evaluation(200, 1.5)]
    paths = draw(write(tmp_path, rows))
    assert [path.name for path in paths] == ["loss.png", "experts.png"]
    for path in paths:
        assert_picture(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts.png", "loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    "rows",
    [
        training(range(10, 11)),
        training(range(10, 30, 10)),
        [{"kind": "train", "step": 1, "loss": None, "nonfinite": ["loss"]}],
        [{"kind": "train", "step": 1, "loss": 2.0}, evaluation(1, 2.0)],
        [evaluation(0, 5.0), evaluation(1, 5.0, "test")],
        [{"kind": "eval", "step": 3, "split": "valid", "loss": None, "bits_per_byte": None}],
        [{"kind": "eval", "step": 3, "split": "valid", "loss": 2.0}],
    ],
    ids=["one row", "two rows", "nan", "no layers", "only evaluations", "nan evaluation", "no bits per byte"],
)
def test_short_runs_draw_what_they_have(tmp_path, rows):
    names = [path.name for path in draw(write(tmp_path, rows))]
    assert names == ["loss.png", "experts.png"][: 2 if any("layers" in row for row in rows) else 1]


def test_a_torn_line_and_layers_that_changed_do_not_matter(tmp_path):
    rows = [*training(range(1, 5), layers=2, experts=4), *training(range(5, 9), layers=3, experts=8)]
    write(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "lo')
    assert len(draw(tmp_path)) == 2


@pytest.mark.parametrize("content", [None, b"", b"\n", b"not json\n", b'{"kind": "note", "step": 1}\n'])
def test_nothing_to_plot_is_said(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    said: list[str] = []
    assert draw(tmp_path, said.append) == []
    assert len(said) == 1
    assert "nothing to plot" in said[0]


def test_bits_per_byte_stand_on_the_right_axis(tmp_path):
    figure = _loss_figure([*training(range(10, 100, 10)), evaluation(50, 2.0), evaluation(90, 1.5)], "run")
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_ylabel() == "loss, nats per token"
    (right,) = axes.child_axes
    assert right.get_ylabel() == "bits per byte"
    figure.draw_without_rendering()
    assert np.array(right.get_ylim()) == pytest.approx(np.array(axes.get_ylim()) / math.log(2))
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["training", "valid, last 1.5 nats per token = 2.164 bits per byte"]


def test_the_training_curve_is_what_compares_with_validation():
    rows = [{"kind": "train", "step": step, "loss": 3.0, "cross_entropy": 2.0} for step in (1, 2)]
    figure = _loss_figure(rows, "run")
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    assert np.asarray(line.get_ydata()).tolist() == [2.0, 2.0]


def test_loads_are_relative_to_an_even_share_and_many_rows_are_added_up():
    rows = [{"step": step, "layers": {"7": {"tokens_per_expert": [6, 2, 0, 0]}}} for step in range(10, 10010, 10)]
    edges, loads = _loads(rows, "7")
    assert loads.shape == (4, 150)
    assert loads == pytest.approx(np.array([[3.0], [1.0], [0.0], [0.0]]).repeat(150, 1))
    assert edges[0] == 0
    assert edges[-1] == 10000
    assert (np.diff(edges) > 0).all()


def test_the_running_mean_follows_a_line_and_skips_gaps():
    line = np.arange(50.0)
    smooth = _running_mean(line, 9)
    assert smooth[:46] == pytest.approx(line[:46])
    line[20] = math.nan
    assert np.isfinite(_running_mean(line, 9)).all()
    assert np.isnan(_running_mean(np.array([math.nan, 1.0]), 1)).tolist() == [True, False]


@pytest.mark.parametrize(("panels", "grid"), [(1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (24, (6, 4)), (23, (6, 4))])
def test_panels_fill_the_picture(panels, grid):
    assert _grid(panels) == grid


def test_the_command_redraws(tmp_path, capsys):
    write(tmp_path, training(range(1, 4)))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "loss.png"), str(tmp_path / "experts.png")]
    assert main([str(tmp_path / "missing")]) == 2
    assert "no such run folder" in capsys.readouterr().err
