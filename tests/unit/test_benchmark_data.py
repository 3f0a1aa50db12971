"""The benchmark of preparation: what it compares, and what a row says."""

import time
from pathlib import Path

import pytest

from moe_train import benchmark_data
from moe_train.data.tokenizer import train_sentencepiece


def test_preparation_is_measured_in_pairs_with_a_loop_over_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looped: list[list[str]] = []
    bare_loop = benchmark_data._bare_loop
    monkeypatch.setattr(benchmark_data, "PAIRS", 3)
    monkeypatch.setattr(benchmark_data, "_bare_loop", lambda p, texts: (looped.append(list(texts)), bare_loop(p, texts)))
    train_sentencepiece([f"some words {i}\n" for i in range(200)], tmp_path / "t.model", 300)
    row = benchmark_data.measure_prepare(str(tmp_path / "t.model"), 0.03, 1, document_bytes=500)
    assert len(looped) == row["pairs"] == 3
    assert looped[0] == looped[1] == looped[2]
    assert row["documents"] == len(looped[0]) > 50
    assert max(map(len, looped[0])) == 500
    assert row["megabytes"] == pytest.approx(0.03, rel=0.1)
    assert 0 < row["share_of_bare_least"] <= row["share_of_bare"] <= row["share_of_bare_most"]
    assert "share_of_bare" not in benchmark_data.measure_prepare("bytes", 0.01, 1)


@pytest.mark.slow
def test_several_workers_are_measured_beside_as_many_processes_of_the_loop(tmp_path: Path) -> None:
    train_sentencepiece([f"some words {i}\n" for i in range(200)], tmp_path / "t.model", 300)
    texts = [f"some words {i} " * 20 for i in range(4000)]
    alone = benchmark_data._bare_seconds(str(tmp_path / "t.model"), texts, 1, time.perf_counter)
    assert alone / 20 < benchmark_data._bare_seconds(str(tmp_path / "t.model"), texts, 2, time.perf_counter) < 2 * alone
