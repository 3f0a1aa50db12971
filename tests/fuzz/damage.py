"""What the fuzz tests share: damage to the bytes of a file, and the two outcomes that are allowed."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from moe_train.errors import UserError

NUMBERS = [0, 1, 2, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
LONGEST_LINE, MOST_LINES = 1100, 60


def examples(fast: int, slow: int) -> Any:
    """Parametrise a test with its number of examples: `fast` in every run, `slow` with -m slow."""
    return pytest.mark.parametrize("examples", [fast, pytest.param(slow, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])


def plan(count: int) -> settings:
    """The same `count` examples in every run. A hang is ended by pytest's timeout, not by a deadline: machines can be busy."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


def outcome(call: Callable[[], Any]) -> str | None:
    """None where `call` works, or the message of its UserError. Anything else that it raises, or a message that is none, fails."""
    try:
        call()
    except UserError as error:
        message = str(error)
    else:
        return None
    lines = message.split("\n")
    assert lines[0].strip(), "an empty message"
    assert all(line.startswith("  ") for line in lines[1:]), message
    assert len(lines) <= MOST_LINES, f"{len(lines)} lines"
    assert max(map(len, lines)) <= LONGEST_LINE, message
    assert all(line.isprintable() for line in lines), repr(message)
    for sign in ("Traceback", "MemoryError", "allocate", 'File "'):
        assert sign not in message
    return message


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` after one to four accidents: bits flipped, parts cut, repeated, moved, zeroed, or overwritten by a number."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        size = len(changed)
        accident = draw(st.sampled_from(["flip", "byte", "number", "zero", "cut", "drop", "add", "repeat", "swap"]))
        at = draw(st.integers(0, max(size - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 8, 12, 64, 4096]))
        part = bytes(changed[at : at + length])
        if accident == "flip" and size:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif accident == "byte" and size:
            changed[at] = draw(st.integers(0, 255))
        elif accident == "number":
            width = draw(st.sampled_from([4, 8]))
            number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * width)
            changed[at : at + width] = number.to_bytes(width, "little")
        elif accident == "zero":
            changed[at : at + length] = bytes(len(part))
        elif accident == "cut":
            del changed[at:]
        elif accident == "drop":
            del changed[at : at + length]
        elif accident == "add":
            changed += draw(st.binary(max_size=64))
        elif accident == "repeat":
            changed[at:at] = part
        elif accident == "swap":
            other = draw(st.integers(0, max(size - 1, 0)))
            changed[at : at + length], changed[other : other + length] = changed[other : other + length], part
    return bytes(changed)
