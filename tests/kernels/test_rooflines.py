"""The FLOPs, bytes and roofline times that the docstrings state are those of the shapes that they name."""

import importlib
import re

import pytest

CHIPS = ((312e12, 2.04e12), (989e12, 3.35e12), (989e12, 4.8e12))  # A100, H100, H200: bf16 FLOP/s, bytes/s
T, E, K, D, F, P, V = 16_384, 16, 4, 1280, 448, 128, 96_512
M = T * K
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "u": 1e-6, "m": 1e-3}


def text(op):
    return " ".join(importlib.import_module(f"moe_kernels.{op}.reference").__doc__.split())


def times(flops, moved):
    return [max(flops / peak, moved / bandwidth) for peak, bandwidth in CHIPS]


def quantity(stated):
    """The number in "1.3 GFLOP", "381 MB" or "103 us", in FLOP, bytes or seconds."""
    number, unit = re.search(r"([\d.,]*\d)\s*([kMGTum]?)(?:FLOP|B|s)\b", stated).groups()
    return float(number.replace(",", "")) * _UNITS[unit]


def agrees(stated, value, unit=1.0):
    """Whether a stated number is `value`, to the digits that are stated and one in the last."""
    number = stated.replace(",", "")
    step = 10.0 ** -len(number.partition(".")[2])
    return abs(float(number) - value / unit) <= 0.6 * step


def rows(op):
    """First cell -> the other cells of each row of the tables in an op's docstring."""
    lines = importlib.import_module(f"moe_kernels.{op}.reference").__doc__.splitlines()
    cells = [[cell.strip() for cell in line.strip(" |").split("|")] for line in lines if line.startswith("| ")]
    return {first: others for first, *others in cells}


TABLES = {
    "moe_mlp": {
        "up projection, SwiGLU": (4 * M * D * F, 2 * (M * D + 3 * M * F + 2 * E * D * F)),
        "down projection": (2 * M * D * F, 2 * (M * F + M * D + E * D * F)),
        "combine": (2 * M * D, 2 * (M * D + T * D)),
        "dA (gradient through SwiGLU)": (2 * M * D * F, 2 * (M * D + 5 * M * F + E * D * F)),
        "dW down": (2 * M * D * F, 2 * (M * D + M * F + E * D * F)),
        "dX rows": (4 * M * D * F, 2 * (2 * M * F + 2 * E * D * F + M * D)),
        "dX sum": (M * D, 2 * (M * D + T * D)),
        "dW gate and up": (4 * M * D * F, 2 * (2 * M * F + M * D + 2 * E * D * F)),
    },
    "grouped_mm": dict.fromkeys(
        ("forward", "gradient of rows", "gradient of w"),
        (2 * M * D * 2 * F, 2 * (M * D + M * 2 * F + E * D * 2 * F)),
    ),
    "permutation": {
        "sort_by_expert": (0, 16 * M),
        "permute": (0, 2 * T * D + 2 * M * D),
        "unpermute": (2 * M * D, 2 * M * D + 2 * T * D),
        "unpermute backward": (4 * M * D, 4 * M * D + 2 * T * D),
    },
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, table in TABLES.items() for name in table])
def test_tables(op, name):
    flops, moved = TABLES[op][name]
    stated_flops, stated_bytes, *stated_times = rows(op)[name]
    if flops:
        assert quantity(stated_flops.rpartition("=")[2]) == pytest.approx(flops, rel=0.03, abs=6e7)
    assert quantity(stated_bytes.rpartition("=")[2]) == pytest.approx(moved, rel=0.01)
    for stated, exact in zip(stated_times, times(flops, moved), strict=True):
        assert agrees(stated.removesuffix("us").strip(), exact, 1e-6), (stated, exact)


def test_the_whole_expert_mlp():
    """The last row is the sum of the others."""
    parts = TABLES["moe_mlp"].values()
    stated_flops, stated_bytes, *stated_times = rows("moe_mlp")["forward + backward"]
    assert quantity(stated_flops.rpartition("=")[2]) == pytest.approx(18 * M * D * F, rel=0.002)
    assert quantity(stated_bytes) == pytest.approx(sum(moved for _, moved in parts), rel=0.02)
    sums = [sum(column) for column in zip(*(times(*part) for part in parts), strict=True)]
    for stated, exact in zip(stated_times, sums, strict=True):
        assert float(stated.replace(",", "")) == pytest.approx(exact * 1e6, rel=0.003)


SENTENCES = {  # op -> (a pattern that finds FLOPs, where they count, bytes and times of A100, H100 and H200; FLOPs; bytes)
    "gru": [
        (
            r"forward: ([\d.]+ GFLOP), (\d+ MB): A100 (\d+) us, H100 (\d+) us, H200 (\d+) us",
            T * 12 * P * P,
            T * (2 + 4 + 4) * P,
        ),
        (r"Backward: ([\d.]+ GFLOP), (\d+ MB): A100 (\d+) us, H100 (\d+) us, H200 (\d+) us", T * 36 * P * P, T * 6_912),
    ],
    "rms_norm": [
        (r"rms_norm forward (\d+ MB): A100 (\d+) us, H100 (\d+) us, H200 (\d+) us", 0, 4 * T * D),
        (r"backward (\d+ MB): (\d+), (\d+), (\d+) us", 0, 6 * T * D),
        (r"add_rms_norm (\d+ MB): (\d+), (\d+), (\d+) us", 0, 8 * T * D),
    ],
    "rope": [(r"bf16 = (\d+ MB): A100 (\d+) us, H100 (\d+) us, H200 (\d+) us", 0, 2 * 2 * T * 20 * 64)],
    "swiglu": [
        (r"forward (\d+ MB): A100 (\d+) us, H100 (\d+) us, H200 (\d+) us", 0, 6 * M * F),
        (r"backward (\d+ MB): (\d+), (\d+), (\d+) us", 0, 10 * M * F),
    ],
    "topk": [
        (
            rf"P={width} +(\d+ MFLOP), +(\d+ MB): A100 +(\d+) us, H100 +(\d+) us, H200 +(\d+) us",
            2 * T * width * E,
            T * (2 * width + 8 * E + 8 * K),
        )
        for width in (128, 1280)
    ]
    + [
        (
            rf"P={width} .*?; backward ([\d.]+ [MG]FLOP), +(\d+ MB): A100 +(\d+) us, H100 +(\d+) us, H200 +(\d+) us",
            4 * T * width * E,
            T * (6 * width + 14 * E + 12 * K),
        )
        for width in (128, 1280)
    ],
}


@pytest.mark.parametrize(("op", "place"), [(op, place) for op, places in SENTENCES.items() for place in range(len(places))])
def test_sentences(op, place):
    pattern, flops, moved = SENTENCES[op][place]
    *stated_flops, stated_bytes, a100, h100, h200 = re.search(pattern, text(op)).groups()
    assert [quantity(stated) for stated in stated_flops] == pytest.approx([flops] if flops else [], rel=0.04)
    assert quantity(stated_bytes) == pytest.approx(moved, rel=0.03)
    for stated, exact in zip((a100, h100, h200), times(flops, moved), strict=True):
        assert agrees(stated, exact, 1e-6), (stated, exact)


def test_the_recurrent_router_per_token():
    stated = re.search(
        r"forward 12 P\^2 = (\d+ kFLOP) and ([\d,]+ B) .*?; backward (\d+ kFLOP) \(.*?\) and ([\d.]+ kB)", text("gru")
    )
    exact = (12 * P * P, 10 * P, 36 * P * P, 6_912)
    assert [quantity(number) for number in stated.groups()] == pytest.approx(exact, rel=0.01)


def test_the_loss():
    """Arithmetic at peak; the logits pass through memory six times in 16 bits."""
    said, flops, moved = text("cross_entropy"), 6 * T * V * D, 6 * 2 * T * V
    assert quantity(re.search(r"[\d.]+ TFLOP", said).group()) == pytest.approx(flops, rel=0.01)
    a100, hopper = re.search(r"TFLOP: A100 (\d+) ms, H100 and H200 (\d+) ms", said).groups()
    assert agrees(a100, flops / CHIPS[0][0], 1e-3)
    assert agrees(hopper, flops / CHIPS[1][0], 1e-3)
    stated = re.search(r"\((\d+ GB) in all: A100 ([\d.]+) ms, H100 ([\d.]+) ms, H200 ([\d.]+) ms\)", said).groups()
    assert quantity(stated[0]) == pytest.approx(moved, rel=0.02)
    for number, (_, bandwidth) in zip(stated[1:], CHIPS, strict=True):
        assert agrees(number, moved / bandwidth, 1e-3)
    assert quantity(re.search(r"weight gradient \((\d+ MB)\)", said).group(1)) == pytest.approx(4 * V * D, rel=0.01)
