"""Run files of any content: a config that reads back, or one message."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import damaged, examples, outcome, plan
from hypothesis import given
from hypothesis import strategies as st

from moe_train.cli import LARGEST_FILE, describe_keys, dump, load_run, parse
from moe_train.config import Config

ROOT = Path(__file__).parents[2]
RUN = (ROOT / "configs/rmoe_1b_8xa100.yaml").read_text(encoding="utf-8")
KEYS = [row[0] for row in describe_keys()]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2, 3, 8, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 1e30, 1e308, -0.0, 5e-324])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["auto", "topk", "recurrent", "ensemble", "none", "1e-3", "\0", "\ud800", "\x1b[2J", "a\nb", "..", "x" * 5000]
    )
)
SOME_KEYS = st.sampled_from(["name", "top_k", "dir"]) | st.text(max_size=6)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SOME_KEYS, inner, max_size=3), max_leaves=8
)


def check(config: Config) -> None:
    """A config that was accepted is what its own text says."""
    assert dump(config)
    assert all(str(conflict) for conflict in config.layout_conflicts(8))


@examples(50, 2_000)
def test_damaged_text(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "run.yaml"

    @plan(examples)
    @given(damaged(RUN.encode()))
    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        outcome(lambda: check(load_run(path)))

    attempt()


@examples(50, 2_000)
def test_text_of_yaml_words(tmp_path: Path, examples: int) -> None:
    """Grammar without sense."""
    path = tmp_path / "run.yaml"
    words = (
        "model train data router name hidden_size steps extends & * a b : , - ? | > [ ] { } ! !! !!int !!x/y << # % @ ` \" '"
    )
    parts = st.sampled_from(
        [
            *words.split(),
            " ",
            "\n",
            "\n  ",
            "\t",
            ": ",
            "- ",
            "0x",
            "1e9",
            ".nan",
            "~",
            "2026-01-01",
            "\ufeff",
            "é",
            "---",
            "...",
        ]
    )

    @plan(examples)
    @given(st.lists(parts, max_size=40).map("".join))
    def attempt(text: str) -> None:
        path.write_text(text, encoding="utf-8")
        outcome(lambda: check(load_run(path)))

    attempt()


@examples(80, 2_000)
def test_other_values_and_structures(examples: int) -> None:
    @plan(examples)
    @given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=4))
    def attempt(edits: dict[str, Any]) -> None:
        content: dict[str, Any] = {}
        for path, value in edits.items():
            *sections, last = path.split(".")
            place = content
            for key in sections:
                below = place.setdefault(key, {})
                place = below if isinstance(below, dict) else {}
            place[last] = value
        outcome(lambda: check(parse(content, "run.yaml")))

    attempt()


@examples(40, 2_000)
def test_other_values_in_a_file(tmp_path: Path, examples: int) -> None:
    """The same through YAML: a value in the middle of a sound run."""
    path = tmp_path / "run.yaml"
    sound = yaml.safe_load(RUN)

    @plan(examples)
    @given(
        st.sampled_from([*sound]),
        st.text(min_size=1, max_size=8) | st.sampled_from([key for part in sound.values() for key in part]),
        VALUES,
    )
    def attempt(section: str, key: str, value: Any) -> None:
        path.write_text(yaml.safe_dump({**sound, section: {**sound[section], key: value}}), encoding="utf-8")
        outcome(lambda: check(load_run(path)))

    attempt()


def bomb(line: str) -> str:
    return "a0: &a0 [x, x]\n" + "".join(line.format(i, i - 1) for i in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [
        bomb("a{0}: &a{0} [*a{1}, *a{1}, *a{1}, *a{1}]\n"),
        bomb("a{0}: &a{0} {{<<: [*a{1}, *a{1}, *a{1}]}}\n"),
        "data: &a {train: *a}",
        "data: {train: &a [*a]}",
        "[" * 100_000,
        "{a: " * 100_000,
        "".join(" " * i + f"k{i}:\n" for i in range(900)),
        "- " * 50_000,
        "train: {steps: " + "9" * 100_000 + "}",
        "train: {steps: 0x" + "f" * 100_000 + "}",
        "optim: {lr: " + ":".join(["1"] * 1000) + ".0}",
        "optim: {lr: 1" + "0" * 5000 + ".0}",
        "optim: {lr: .inf}",
        "optim: {lr: -.nan}",
        "run: {dir: !!timestamp x}",
        "run: {seed: !!bool x}",
        "run: {seed: !!float ''}",
        "run: {seed: !!int ''}",
        "run: {seed: !!python/object/apply:os.system [true]}",
        "run: !!set {a, b}",
        "data: !!binary aGVsbG8=",
        "".join(f"key{i}: 1\n" for i in range(3_000)),
        "".join(f"key{i}: 1\n" for i in range(20_000)) + "key0: 2\n",
        "x" * 200_000 + ": 1",
        "? [a, b]\n: c",
        '"\\ud800": 1',
        '"\\e[2J\\n": 1',
        "run: {dir: '" + "x" * (LARGEST_FILE + 1) + "'}",
        "%YAML 9.9\n---\n",
        "a: 1\n---\nb: 2\n",
        "extends: [a, [b]]",
        "extends: {a: b}",
        'extends: "\\0"',
        'extends: "\\ud800"',
        "extends: /",
        "extends: /dev/zero",
        "extends: " + "x" * 5000,
    ],
    ids=lambda text: text[:24],
)
def test_known_bombs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert outcome(lambda: load_run(path)) is not None


@examples(25, 1_000)
def test_files_that_extend_each_other_in_any_way(tmp_path: Path, examples: int) -> None:
    names = [f"{i}.yaml" for i in range(6)]

    @plan(examples)
    @given(st.lists(st.lists(st.sampled_from([*names, "gone.yaml", "."]), max_size=3), min_size=6, max_size=6))
    def attempt(parents: list[list[str]]) -> None:
        for name, above in zip(names, parents, strict=True):
            (tmp_path / name).write_text(yaml.safe_dump({"extends": above, "run": {"seed": len(above)}}))
        outcome(lambda: check(load_run(tmp_path / "0.yaml")))

    attempt()


def test_chains_and_trees_of_files_end(tmp_path: Path) -> None:
    for i in range(120):
        (tmp_path / f"chain{i}.yaml").write_text(f"extends: chain{i + 1}.yaml\n")
        (tmp_path / f"tree{i}.yaml").write_text(f"extends: [tree{i + 1}.yaml, tree{i + 1}.yaml]\n" if i < 40 else "")
    (tmp_path / "loop").symlink_to("loop")
    assert "more than 100 files" in str(outcome(lambda: load_run(tmp_path / "chain0.yaml")))
    assert "more than 100 files" in str(outcome(lambda: load_run(tmp_path / "tree0.yaml")))
    assert outcome(lambda: load_run(tmp_path / "loop"))
