"""Rows: one JSON object per measurement, written as soon as it is known, and the table printed at the end."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STATUSES = ("ok", "wrong", "failed", "unavailable")
_REASON_LENGTH = 240
_CASE = ("op", "shape", "routing", "pass", "provider")
_HEADER = (*_CASE, "p50 ms", "p20-p80", "ratio", "TFLOP/s", "GB/s", "share", "peak MB", "saved MB", "err")


class Writer:
    """Appends rows to a file, each flushed, and keeps them for the table."""

    def __init__(self, path: Path | None, run: dict[str, str]) -> None:
        self.path, self.run = path, run
        self.rows: list[Row] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Row) -> None:
        """Append one row, with the fields of the run."""
        if row["status"] not in STATUSES:
            raise ValueError(f"status {row['status']!r} is none of {', '.join(STATUSES)}")
        row = self.run | {name: _short(value) for name, value in row.items()}
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:  # opened for each row: what is written survives whatever comes next
                file.write(json.dumps(row) + "\n")


def one_line(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:_REASON_LENGTH]


def _short(value: Any) -> Any:
    """Floats with five significant digits; what JSON has no number for (NaN, infinity) as text."""
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)


def table(rows: list[Row], ours: str = "triton") -> str:
    """Rows as text, grouped by case and fastest first; `ratio` is the median time over that of `ours` in the same case."""
    baseline = {_case(row): row["p50_ms"] for row in rows if row["provider"] == ours and row["status"] == "ok"}
    order = {case: i for i, case in enumerate(dict.fromkeys(_case(row) for row in rows))}
    ordered = sorted(rows, key=lambda row: (order[_case(row)], row.get("p50_ms") or float("inf")))
    lines = [_HEADER, *(_cells(row, baseline.get(_case(row))) for row in ordered)]
    widths = [max(len(line[i]) for line in lines if len(line) == len(_HEADER)) for i in range(len(_HEADER))]
    return "\n".join(_line(line, widths) for line in lines)


def _case(row: Row) -> tuple[Any, ...]:
    return row["op"], row.get("shape"), row.get("routing"), row.get("pass")


def _cells(row: Row, ours: float | None) -> tuple[str, ...]:
    head = tuple(str(row.get(name) or "-") for name in _CASE)
    if row["status"] != "ok":
        return (*head, f"{row['status']}: {row.get('reason', '')}")
    share = max((row[name] for name in ("share_of_matmul", "share_of_copy") if name in row), default=None)
    return (
        *head,
        f"{row['p50_ms']:.4g}",
        f"{row['p20_ms']:.4g}-{row['p80_ms']:.4g}",
        _number(row["p50_ms"] / ours if ours else None, ".2f"),
        _number(row.get("tflops"), ".4g"),
        _number(row.get("gbs"), ".4g"),
        _number(share, ".0%"),
        _number(_megabytes(row.get("peak_bytes")), ".0f"),
        _number(_megabytes(row.get("saved_bytes")), ".1f"),
        _number(row.get("error"), ".1e"),
    )


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()
