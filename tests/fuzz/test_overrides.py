"""Any words after the run file: a config, or one message."""

import contextlib
from pathlib import Path

from damage import examples, outcome, plan
from hypothesis import given
from hypothesis import strategies as st

from moe_train.cli import config_from_words, describe_keys

RUN = str(Path(__file__).parents[2] / "configs/rmoe_1b_8xa100.yaml")
KEYS = [row[0] for row in describe_keys()]
PARTS = [
    "a",
    ".",
    "=",
    "==",
    "-",
    "--",
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    "*",
    "&a",
    "!!int",
    "'",
    '"',
    "\\",
    "\n",
    "\t",
    " ",
    "#",
    "%",
]
PARTS += [
    "1",
    "-1",
    "1e9",
    "1e999",
    ".nan",
    "~",
    "true",
    "0x",
    "9" * 30,
    "auto",
    "topk",
    "\0",
    "\udcff",
    "é",
    "\x1b",
    "model",
    "router",
]
VALUES = st.lists(st.sampled_from(PARTS), max_size=6).map("".join) | st.text(max_size=10)
PATHS = (
    st.sampled_from(KEYS) | VALUES | st.lists(st.sampled_from(["model", "router", "name", "a", ""]), max_size=5).map(".".join)
)
WORDS = st.tuples(PATHS, st.sampled_from(["=", "=", "=", ""]), VALUES).map("".join)


def read(words: list[str]) -> None:
    """What a launch script does with its words. Printing help, a schema or a config ends it."""
    with contextlib.suppress(SystemExit):
        config_from_words(words, "launch/pretrain.py", "Train.")


@examples(50, 2_000)
def test_random_words_after_a_run_file(examples: int) -> None:
    @plan(examples)
    @given(st.lists(WORDS, min_size=1, max_size=4))
    def attempt(words: list[str]) -> None:
        outcome(lambda: read([RUN, *words]))

    attempt()


@examples(20, 1_000)
def test_random_words_alone(examples: int) -> None:
    @plan(examples)
    @given(st.lists(st.text(max_size=12) | st.sampled_from(["/", "/dev/null", "\0", "--help", "--schema"]) | WORDS, max_size=3))
    def attempt(words: list[str]) -> None:
        outcome(lambda: read(words))

    attempt()


def test_depth_and_length_are_bounded() -> None:
    for word in (
        ".".join("a" * 50_000) + "=1",
        "model." * 10_000 + "x=1",
        "a" * 10**6 + "=1",
        "model.hidden_size=" + "[" * 10_000,
        "a=" * 10_000,
    ):
        assert outcome(lambda word=word: read([RUN, word])), word[:20]
