"""What the person at the terminal sees of a run: a progress line, or plain lines without control characters."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Shown = dict[str, Callable[[float], str]]
# What is shown of a row, in this order: name -> text.
_PROGRESS: Shown = {
    "loss": lambda x: f"loss {x:.4f}",
    "tokens_per_second": lambda x: f"{_short(x)} tok/s",
    "mfu": lambda x: f"MFU {x:.1%} causal",
    "mfu_full": lambda x: f"{x:.1%} full",
}
_HEALTH: Shown = {
    "lr": lambda x: f"lr {x:.2e}",
    "grad_norm": lambda x: f"grad {x:.3g}",
    "load_max_mean": lambda x: f"load {x:.2f}",
    "entropy_min": lambda x: f"entropy {x:.2f}",
    "dead_experts": lambda x: f"dead {x:.0f}",
}
_EVALUATION: Shown = {
    "loss": lambda x: f"loss {x:.4f} nats",
    "bits_per_byte": lambda x: f"{x:.4f} bits per byte",
    "perplexity": lambda x: f"perplexity {x:.4g}",
    "accuracy": lambda x: f"accuracy {x:.2%}",
}


def _describe(row: Row, shown: Shown) -> list[str]:
    return [text(row[name]) for name, text in shown.items() if isinstance(row.get(name), int | float)]


def describe_evaluation(row: Row) -> list[str]:
    """The figures of an evaluation row, as a line of log.txt and the screen has them."""
    return _describe(row, _EVALUATION)


def _short(value: float) -> str:
    """12345.6 -> 12.3k."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Screen:
    """What the person at the terminal sees: a live line, or plain lines without control characters."""

    def __init__(self, total_steps: int, live: bool | None) -> None:
        self.total_steps = total_steps
        self.step: int = 0
        self.row: Row = {}
        self.first: tuple[int, float] | None = None  # the first step that ended and when; it is slower than the others
        self.last = 0.0
        self.live: Live | None = None
        console = Console(force_terminal=live or None, highlight=False, markup=False, emoji=False)
        # isatty and not rich's own guess: FORCE_COLOR, which CI systems set, would put escape codes into log files.
        if live or (live is None and sys.stdout.isatty() and not console.is_dumb_terminal):
            self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
            self.live.start()

    def tick(self, step: int) -> None:
        """Step `step` has ended."""
        self.step, self.last = step, time.perf_counter()
        if self.first is None:
            self.first = (step, self.last)

    def train(self, step: int, row: Row) -> None:
        """Show a training row."""
        self.tick(step)
        self.row = row
        if self.live is None:
            self.say(self.line(step, row))

    def line(self, step: int, row: Row) -> str:
        """A training row as a plain line."""
        count = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        return "  ".join([count, *_describe(row, _PROGRESS | _HEALTH), *self._eta()])

    def say(self, text: str) -> None:
        """Print a message."""
        text = _printable(text)
        if self.live is not None:
            self.live.console.print(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the last state of the live line on the screen."""
        if self.live is not None:
            self.live.stop()

    def _eta(self) -> list[str]:
        """Time that the remaining steps will take at the mean pace since the first step ended, pauses included."""
        if self.first is None or self.step <= self.first[0]:
            return []
        pace = (self.last - self.first[1]) / (self.step - self.first[0])
        return [f"ETA {_duration(pace * (self.total_steps - self.step) - (time.perf_counter() - self.last))}"]

    def _render(self) -> Group:
        top = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.total_steps, completed=self.step, width=32)
        top.add_row(f"step {self.step}/{self.total_steps}", bar, *self._eta())
        return Group(top, *(Text("  ".join(_describe(self.row, shown))) for shown in (_PROGRESS, _HEALTH)))


def without_controls(text: str) -> str:
    """Without control characters, of which sampled text may hold any."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _printable(text: str) -> str:
    """Escape control characters and what stdout's encoding cannot say."""
    text = without_controls(text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
