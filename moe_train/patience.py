"""Asking what may never answer."""

import threading
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def within(seconds: float, ask: Callable[[], Answer]) -> Answer | None:
    """What `ask` returns; None where it has not after `seconds`, or a connection is lost. It may then go on in a thread of its own."""
    answers: list[Answer] = []

    def run() -> None:
        try:
            answers.append(ask())
        except RuntimeError:  # torch's stores and process groups raise it
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
