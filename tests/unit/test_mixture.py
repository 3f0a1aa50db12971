"""Blends keep their weights and repeat no row too early, streams continue each other: on any ranks, after any resume."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from moe_train.cli import parse
from moe_train.data.loader import EvalRows, Loader
from moe_train.data.tokenizer import ByteTokenizer
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

FIELDS = ("tokens", "targets", "positions", "doc_ids", "labels", "rows")
S = 8


def write(prefix, value, rows, documents=1):
    """Write `rows` rows of S tokens that say where they are from: [value, row, ...]."""
    with DatasetWriter(prefix, ByteTokenizer()) as writer:
        for part in np.array_split(np.arange(rows), documents):
            writer.add(np.concatenate([np.full(S, value) + np.array([0, i, 0, 0, 0, 0, 0, 0]) for i in part]), str(value))
    return str(prefix)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    return [write(folder / "a", 0, 50), write(folder / "b", 60, 80), write(folder / "c", 150, 100, 3)]


def loader(prefixes, weights=(0.5, 0.3, 0.2), **options):
    return Loader(
        prefixes, **{"seq_len": S, "micro_batch_size": 2, "global_batch_size": 16, "seed": 3, "weights": weights, **options}
    )


def as_dict(batch):
    return {f: getattr(batch, f).tolist() for f in FIELDS}


def drawn(source, steps):
    """(source's value, row) of each sample of the next steps."""
    batches = [b for _ in range(steps) for b in source.next_step().microbatches]
    firsts = torch.cat([b.tokens[:, :2] for b in batches]).tolist()
    return [(value, second - value) for value, second in firsts]


def moved_on(state):
    return json.loads(json.dumps(state))


# Blends


def test_a_blend_keeps_its_weights_at_every_moment(prefixes):
    samples = [value for value, _ in drawn(loader(prefixes), 40)]
    for n in range(1, len(samples) + 1):
        counts = Counter(samples[:n])
        for value, weight in ((0, 0.5), (60, 0.3), (150, 0.2)):
            assert abs(counts[value] - weight * n) <= 1


def test_each_source_goes_through_its_own_rows(prefixes):
    samples = drawn(loader(prefixes), 40)
    for value, rows in ((0, 50), (60, 80), (150, 100)):
        mine = [row for v, row in samples if v == value]
        for start in range(0, len(mine), rows):
            epoch = mine[start : start + rows]
            assert len(set(epoch)) == len(epoch)
        assert set(mine) <= set(range(rows))
    first, second = ([row for v, row in samples if v == 0][i : i + 50] for i in (0, 50))
    assert first != second  # another epoch, another order
    source = loader(prefixes)
    numbers = [r for _ in range(40) for batch in source.next_step().microbatches for r in batch.rows.tolist()]
    assert len(set(numbers)) == len(numbers) == 640


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_get_the_step_of_one_before_and_after_a_resume_at_another_size(prefixes, size):
    one = loader(prefixes)
    ranks = [loader(prefixes, dp_rank=r, dp_size=size) for r in range(size)]
    for at in range(20):
        if at == 7:  # all go on with another number of ranks
            state = moved_on(ranks[0].state_dict())
            assert all(moved_on(r.state_dict()) == state for r in ranks)
            size = {1: 8, 2: 4, 4: 2, 8: 1}[size]
            ranks = [loader(prefixes, dp_rank=r, dp_size=size) for r in range(size)]
            for rank in ranks:
                rank.load_state_dict(state)
        whole, parts = one.next_step(), [r.next_step() for r in ranks]
        assert {part.target_count for part in parts} == {whole.target_count}
        for j, batch in enumerate(whole.microbatches):
            assert as_dict(parts[j % size].microbatches[j // size]) == as_dict(batch)
        assert whole.target_count == sum(int((b.targets != -100).sum()) for b in whole.microbatches)


def test_another_mixture_at_a_resume_repeats_no_row(prefixes):
    a, b, c = prefixes
    source = loader([a, b], (0.5, 0.5))
    seen = drawn(source, 3)
    source = resumed(loader([c, b], (0.25, 0.75)), source)  # without a, with c, with other weights and in another order
    seen += drawn(source, 3)
    assert Counter(v for v, _ in seen[48:]) == {150: 12, 60: 36}
    source = resumed(loader([a, b, c], (1, 1, 2)), source)  # a comes back where it was left
    seen += drawn(source, 2)
    assert len(set(seen)) == len(seen)
    assert Counter(v for v, _ in seen[96:]) == {0: 8, 60: 8, 150: 16}


def resumed(new, old):
    new.load_state_dict(moved_on(old.state_dict()))
    return new


def test_row_numbers_stay_unique_when_the_mixture_changes(prefixes):
    a, b, c = prefixes
    source = loader([a, b], (1, 1))
    numbers = [r for m in source.next_step().microbatches for r in m.rows.tolist()]
    source = resumed(loader([c, a, b], (1, 1, 1)), source)
    numbers += [r for _ in range(2) for m in source.next_step().microbatches for r in m.rows.tolist()]
    assert len(set(numbers)) == len(numbers)


def test_one_corpus_becomes_a_blend_and_goes_on(prefixes):
    a, b, _ = prefixes
    source = loader(a, None)
    seen = drawn(source, 2)
    seen += drawn(resumed(loader([b, a], (1, 2)), source), 1)
    assert len(set(seen)) == len(seen)
    with pytest.raises(UserError, match=r"blend of sources; give data\.weights"):
        loader(a, None).load_state_dict(loader([a, b], (1, 1)).state_dict())


def test_shards_of_a_pattern_are_one_source(tmp_path, prefixes):
    for i in range(12):
        write(tmp_path / f"s{i:02d}", 10 * i, 5)
    source = loader([str(tmp_path / "s*"), prefixes[2]], (3, 1))
    counts = Counter(value >= 150 for value, _ in drawn(source, 5))
    assert counts == {False: 60, True: 20}
    assert source.rows_per_epoch == 12 * 5 + 100
    with pytest.raises(UserError, match=r"no \.idx file matches"):
        loader(str(tmp_path / "t*"), None)


def test_the_same_source_twice_is_refused(prefixes):
    with pytest.raises(UserError, match="names the same data twice"):
        loader([prefixes[0], prefixes[1], prefixes[0]])


@pytest.mark.parametrize("weights", [(1, 2), (1, 2, 0), (1, 2, -1), (1, 2, float("inf")), (1, 2, float("nan"))])
def test_wrong_weights_are_refused(prefixes, weights):
    with pytest.raises(UserError, match=r"data\.weights"):
        loader(prefixes, weights)


@pytest.mark.parametrize(
    "edit",
    [{"cursor": -1}, {"cursor": 2**60}, {"number": True}, {"weight": "1"}, {"weight": -1.0}, {"data": [{}]}, {"taken": None}],
)
def test_a_place_that_no_run_can_have_is_refused(prefixes, edit):
    state = moved_on(loader(prefixes).state_dict())
    state["sources"][1] |= edit
    with pytest.raises(UserError, match="start from another checkpoint"):
        loader(prefixes).load_state_dict(state)
    for sources in (None, [], [3]):
        with pytest.raises(UserError, match="start from another checkpoint"):
            loader(prefixes).load_state_dict(state | {"sources": sources})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"train": ["a", "b"], "weights": [1]}, "data.weights=.* one number for each of the 2 entries"),
        ({"weights": [1]}, "each of the 0 entries"),
        ({"train": ["a", "b"], "weights": [1, 0]}, "data.weights.1=0"),
        ({"train": ["a", "b"], "weights": [1, 2], "order": "contiguous"}, "data.order=contiguous: rows of a blend"),
    ],
)
def test_a_run_with_wrong_weights_is_refused_before_it_starts(data, match):
    with pytest.raises(UserError, match=match):
        parse({"data": data}, "run")


# Contiguous streams


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_row_continues_the_same_row_of_the_step_before(prefixes, size):
    ranks = [loader(prefixes, None, contiguous=True, dp_rank=r, dp_size=size) for r in range(size)]
    steps = 230 // 16  # rows per stream
    for _ in range(2):  # epochs
        before = None
        for at in range(steps):
            parts = [r.next_step() for r in ranks]
            assert {part.continues for part in parts} == {at > 0}
            batches = [parts[j % size].microbatches[j // size] for j in range(8)]
            rows = torch.cat([b.rows for b in batches]) % (steps * 16)
            if before is not None:
                assert rows.tolist() == (before + 1).tolist()
            before = rows
        assert sorted((before - steps + 1).tolist()) == [lane * steps for lane in range(16)]


def test_streams_go_on_after_a_resume_and_only_with_the_same_batch(prefixes):
    source = loader(prefixes, None, contiguous=True)
    for _ in range(20):
        source.next_step()
    again = resumed(loader(prefixes, None, contiguous=True, micro_batch_size=1, dp_rank=1, dp_size=4), source)
    step, part = source.next_step(), again.next_step()
    assert as_dict(part.microbatches[0])["tokens"] == as_dict(step.microbatches[0])["tokens"][1:2]
    assert part.continues
    for options, match in (
        ({"global_batch_size": 8}, r"train\.global_batch_size=8: was \d+ when"),
        ({"contiguous": False}, r"data\.order=shuffled: was contiguous when"),
    ):
        with pytest.raises(UserError, match=match):
            resumed(loader(prefixes, None, **{"contiguous": True, **options}), source)
    with pytest.raises(UserError, match=r"data\.order=contiguous: was shuffled when"):
        resumed(loader(prefixes, None, contiguous=True), loader(prefixes, None))
    with pytest.raises(UserError, match="cannot continue each other"):
        loader(prefixes, contiguous=True)
    with pytest.raises(UserError, match="fewer than 256 rows of 8, one per stream"):
        loader(prefixes, None, contiguous=True, global_batch_size=256)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_in_streams_sees_each_row_once_and_in_order(prefixes, size):
    ranks = [EvalRows(prefixes, seq_len=S, micro_batch_size=3, dp_rank=r, dp_size=size, streams=24) for r in range(size)]
    batches = [list(r) for r in ranks]
    turns = 24 // (3 * size)
    for mine in batches:
        for one, other in zip(mine, mine[turns:], strict=False):
            assert other.rows.tolist() == (one.rows + 1).tolist()
    first = torch.cat([batches[j % size][j // size].rows for j in range(8)])
    assert first.tolist() == list(range(0, 24 * len(batches[0]) // turns, len(batches[0]) // turns))  # by stream, on any ranks
    whole = {int(b.rows[0]): b for b in EvalRows(prefixes, seq_len=S, micro_batch_size=1)}
    seen = []
    for batch in (b for mine in batches for b in mine):
        for i, row in enumerate(batch.rows.tolist()):
            if row in whole:
                seen.append(row)
                assert batch.tokens[i].tolist() == whole[row].tokens[0].tolist()
            else:
                assert (batch.targets[i] == -100).all()
    assert sorted(seen) == sorted(whole)
