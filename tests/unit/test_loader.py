"""The loader: every token once per epoch, rows packed exactly, the same order for any ranks, batches and resumes."""

import dataclasses
import json
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.loader import EvalRows, Loader, count_bytes
from moe_train.data.order import Order
from moe_train.data.tokenizer import ByteTokenizer, train_sentencepiece
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

FIELDS = ("tokens", "targets", "positions", "doc_ids", "labels", "rows")


def write(prefix, documents, labels=None):
    """Write documents of ids and return their prefix."""
    with DatasetWriter(prefix, ByteTokenizer()) as writer:
        for i, ids in enumerate(documents):
            writer.add(np.asarray(ids), labels[i] if labels else "unknown")
    return prefix


def random_documents(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)) for _ in range(count)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    documents = random_documents(200)
    return write(tmp_path_factory.mktemp("loader") / "d", documents, ["abc"[i % 3] for i in range(200)])


def loader(prefixes, **options):
    return Loader(prefixes, **{"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8, "seed": 3, **options})


def as_dict(batch):
    return {f: getattr(batch, f).tolist() for f in FIELDS}


def plain_row(documents, labels, start, size):
    """Build the row of the tokens [start, start + size) one token at a time."""
    stream = [(t, d, i, len(doc)) for d, doc in enumerate(documents) for i, t in enumerate(doc)]
    row = {f: [] for f in FIELDS[:5]}
    position = doc_id = 0
    for at in range(start, start + size):
        if at >= len(stream):
            first = at == max(len(stream), start)
            position, doc_id = (0, doc_id + (at > start)) if first else (position + 1, doc_id)
            values = (0, -100, position, doc_id, 0)
        else:
            token, document, i, length = stream[at]
            if at > start:
                position, doc_id = (0, doc_id + 1) if i == 0 else (position + 1, doc_id)
            target = stream[at + 1][0] if i + 1 < length else -100
            values = (token, target, position, doc_id, labels[document])
        for field, value in zip(FIELDS[:5], values, strict=True):
            row[field].append(int(value))
    return row


# The order


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 9))
@settings(deadline=None, max_examples=80)
def test_an_order_is_a_permutation(count, seed, epoch):
    order = Order(count, seed, epoch)
    things = order(np.arange(count))
    assert sorted(things.tolist()) == list(range(count))
    assert things[count // 2 :].tolist() == order(np.arange(count // 2, count)).tolist()


def test_orders_of_other_seeds_and_epochs_are_unrelated():
    n = 20_000
    base = Order(n, 0, 0)(np.arange(n))
    for other in (Order(n, 0, 1), Order(n, 1, 0)):
        things = other(np.arange(n))
        assert (things == base).sum() < 12
        assert abs(np.corrcoef(things, base)[0, 1]) < 0.03
    assert abs(np.corrcoef(base[1:], base[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(base, np.arange(n))[0, 1]) < 0.03
    ascents = (np.diff(base) > 0).mean()
    assert 0.48 < ascents < 0.52


@pytest.mark.parametrize("count", [3, 4, 7])
def test_orders_of_few_things_all_occur(count):
    first = [int(Order(count, seed)(np.arange(count))[0]) for seed in range(600)]
    share = np.bincount(first, minlength=count) / 600
    assert (abs(share - 1 / count) < 0.08).all()


def test_the_order_never_changes_between_versions():
    assert Order(10, "rows", 0, 0)(np.arange(10)).tolist() == [8, 3, 4, 5, 9, 2, 0, 6, 1, 7]
    assert Order(10**12, "rows", 7, 2)(np.array([0, 1, 10**12 - 1])).tolist() == [62337506286, 701384033433, 7950439520]


# Rows


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_rows_equal_a_token_by_token_construction(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("rows")
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda x: sum(x) > 1))
    size = data.draw(st.integers(2, 9))
    documents = [[(7 * d + i) % 256 for i in range(n)] for d, n in enumerate(lengths)]
    cut = data.draw(st.integers(0, len(documents)))
    names = ["xyz"[d % 3] for d in range(len(documents))]
    parts = [p for p in ((documents[:cut], names[:cut]), (documents[cut:], names[cut:])) if p[0]]
    prefixes = [write(folder / str(i), *part) for i, part in enumerate(parts)]
    rows = EvalRows(prefixes, seq_len=size, micro_batch_size=data.draw(st.integers(1, 3)))
    labels = [rows.label_names.index(name) for name in names]
    seen = 0
    for batch in rows:
        got = as_dict(batch)
        for b, row in enumerate(got["rows"]):
            assert {f: got[f][b] for f in FIELDS[:5]} == plain_row(documents, labels, row * size, size)
            seen += 1
    assert seen >= -(-sum(lengths) // size)


def test_training_rows_are_the_same_rows(prefix):
    whole = {int(r): b for batch in EvalRows(prefix, seq_len=16, micro_batch_size=1) for r, b in [(batch.rows[0], batch)]}
    source = loader(prefix)
    step = source.next_step()
    for batch in step.microbatches:
        for b, row in enumerate(batch.rows.tolist()):
            for field in FIELDS[:5]:
                assert torch.equal(getattr(batch, field)[b], getattr(whole[row], field)[0])


def test_dtypes_and_shapes(prefix):
    batch = loader(prefix).next_step().microbatches[0]
    for field in FIELDS:
        tensor = getattr(batch, field)
        assert tensor.dtype == torch.int64
        assert tensor.shape == ((2,) if field == "rows" else (2, 16))
    assert dataclasses.is_dataclass(batch)


def test_every_row_comes_once_per_epoch_and_never_the_same_number_twice(prefix):
    source = loader(prefix, global_batch_size=6)
    n = source.rows_per_epoch
    numbers = []
    while source.epochs < 3:
        numbers += [r for batch in source.next_step().microbatches for r in batch.rows.tolist()]
    assert len(set(numbers)) == len(numbers)
    for epoch in range(3):
        assert sorted(r % n for r in numbers[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert [r % n for r in numbers[:n]] != [r % n for r in numbers[n : 2 * n]]


def test_an_epoch_holds_every_token_of_the_stream_once(tmp_path):
    documents = random_documents(64, seed=1)
    documents.append(np.ones(-sum(map(len, documents)) % 16 + 16, dtype=np.int64))
    source = loader(write(tmp_path / "d", documents), micro_batch_size=1, global_batch_size=1)
    rows = {}
    for _ in range(source.rows_per_epoch):
        (batch,) = source.next_step().microbatches
        rows[int(batch.rows[0])] = batch.tokens[0]
    stream = np.concatenate(documents)
    assert len(stream) == 16 * source.rows_per_epoch
    assert np.concatenate([rows[r] for r in range(source.rows_per_epoch)]).tolist() == stream.tolist()


def test_data_smaller_than_a_batch_is_repeated(tmp_path):
    source = loader(write(tmp_path / "d", [[1] * 40]), global_batch_size=8)
    rows = [r for batch in source.next_step().microbatches for r in batch.rows.tolist()]
    assert sorted(rows) == list(range(8))


# Steps


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_together_get_the_step_of_one(prefix, size):
    one = loader(prefix, micro_batch_size=1)
    ranks = [loader(prefix, micro_batch_size=1, dp_rank=r, dp_size=size) for r in range(size)]
    for _ in range(40):
        whole = one.next_step()
        parts = [r.next_step() for r in ranks]
        for part in parts:
            assert (part.token_count, part.target_count) == (whole.token_count, whole.target_count)
        for j, batch in enumerate(whole.microbatches):
            assert as_dict(parts[j % size].microbatches[j // size]) == as_dict(batch)


def test_counts_are_those_of_the_tensors(prefix):
    source = loader(prefix)
    for _ in range(30):
        step = source.next_step()
        assert step.token_count == sum(b.tokens.numel() for b in step.microbatches) == 8 * 16
        assert step.target_count == sum(int((b.targets != -100).sum()) for b in step.microbatches)


def test_samples_do_not_depend_on_the_batch_sizes(prefix):
    small, large = loader(prefix, micro_batch_size=1, global_batch_size=4), loader(prefix, micro_batch_size=4)
    pieces = [r for _ in range(6) for b in small.next_step().microbatches for r in b.rows.tolist()]
    assert pieces == [r for _ in range(3) for b in large.next_step().microbatches for r in b.rows.tolist()]


def test_another_seed_gives_another_order(prefix):
    assert (
        loader(prefix, seed=4).next_step().microbatches[0].rows.tolist()
        != loader(prefix).next_step().microbatches[0].rows.tolist()
    )


# Resume


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_resuming_anywhere_continues_exactly(prefix, size):
    source = loader(prefix, micro_batch_size=1)
    steps, states = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(source.state_dict())))
        steps.append(source.next_step())
    for at in (0, 1, 29, 30, 31, 59):
        ranks = [loader(prefix, micro_batch_size=1, dp_rank=r, dp_size=size) for r in range(size)]
        for r in ranks:
            r.load_state_dict(states[at])
        for step in steps[at : at + 3]:
            parts = [r.next_step() for r in ranks]
            assert parts[0].target_count == step.target_count
            for j, batch in enumerate(step.microbatches):
                assert as_dict(parts[j % size].microbatches[j // size]) == as_dict(batch)


def test_a_state_is_small_and_the_same_on_all_ranks(prefix):
    states = [loader(prefix, dp_rank=r, dp_size=4).state_dict() for r in range(4)]
    assert states[1:] == states[:-1]
    assert len(json.dumps(states[0])) < 1000


def test_the_key_of_a_dataset_that_cannot_be_read_is_named(prefix, tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=rf"^data\.train={gone}: dataset file {gone}\.idx does not exist"):
        loader([prefix, gone])
    with pytest.raises(UserError, match=rf"^data\.test={gone}-\*: dataset .* no \.idx file matches"):
        EvalRows(f"{gone}-*", seq_len=8, micro_batch_size=1, key="data.test")
    with pytest.raises(UserError, match=rf"^dataset file {gone}\.idx"):
        EvalRows(gone, seq_len=8, micro_batch_size=1)


def test_resuming_with_something_else_says_what_changed(prefix, tmp_path):
    state = loader(prefix).state_dict()
    other = write(tmp_path / "other", random_documents(200, seed=9))
    for source, match in (
        (loader(prefix, seq_len=8), r"train\.seq_len=8: was 16 when the run was saved"),
        (loader(prefix, seed=4), r"run\.seed=4: was 3"),
        (loader(other), "is not the one that the run was saved with"),
        (loader([prefix, other]), "saved with 1 datasets, now there are 2"),
    ):
        with pytest.raises(UserError, match=match):
            source.load_state_dict(state)
    with pytest.raises(UserError, match="version 99"):
        loader(prefix).load_state_dict({**state, "version": 99})
    with pytest.raises(UserError, match="no place in the data"):
        loader(prefix).load_state_dict({"version": 1})


@pytest.mark.parametrize(
    "edit",
    [
        {"samples": -1},
        {"samples": True},
        {"samples": 2**62},
        {"samples": 10**30},
        {"samples": 1.5},
        {"data": None},
        {"data": [3]},
        {"data": [{}]},
        {"data": {"fingerprint": 1}},
    ],
)
def test_a_state_that_no_run_can_have_is_refused(prefix, edit):
    with pytest.raises(UserError, match="no place in the data"):
        loader(prefix).load_state_dict({**loader(prefix).state_dict(), **edit})
    with pytest.raises(UserError, match="version None"):
        loader(prefix).load_state_dict(None)


def test_data_that_moved_is_the_same_data(prefix, tmp_path):
    for suffix in (".bin", ".idx", ".labels", ".json"):
        (tmp_path / f"moved{suffix}").write_bytes((prefix.parent / f"d{suffix}").read_bytes())
    source = loader(prefix)
    source.next_step()
    moved = loader(tmp_path / "moved")
    moved.load_state_dict(source.state_dict())
    assert as_dict(moved.next_step().microbatches[0]) == as_dict(source.next_step().microbatches[0])


# Several datasets


def test_labels_are_joined_by_name(tmp_path):
    prefixes = [write(tmp_path / "a", [[1] * 8], ["x"]), write(tmp_path / "b", [[2] * 8, [3] * 8], ["y", "x"])]
    rows = EvalRows(prefixes, seq_len=24, micro_batch_size=1)
    assert rows.label_names == ("unknown", "x", "y")
    (batch,) = rows
    assert batch.labels.tolist() == [[1] * 8 + [2] * 8 + [1] * 8]
    assert batch.doc_ids.tolist() == [[0] * 8 + [1] * 8 + [2] * 8]
    assert (batch.targets == -100).nonzero()[:, 1].tolist() == [7, 15, 23]


def test_datasets_of_different_tokenizers_do_not_mix(tmp_path):
    trained = train_sentencepiece([f"some words {i}\n" for i in range(200)], None, 300)
    with DatasetWriter(tmp_path / "s", trained) as writer:
        writer.add_text("some words" * 20)
    with pytest.raises(UserError, match="different tokenizers"):
        loader([write(tmp_path / "b", [[1] * 99]), tmp_path / "s"])
    with pytest.raises(UserError, match=r"prepared with tokenizer sentencepiece .* the run has bytes"):
        loader(tmp_path / "s", tokenizer=ByteTokenizer())
    assert loader(tmp_path / "s", tokenizer=trained, vocab_size=320).rows_per_epoch > 0


# Evaluation


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_rows", [None, 1, 5, 10**6])
def test_evaluation_sees_each_row_once_on_any_number_of_ranks(prefix, size, max_rows):
    ranks = [EvalRows(prefix, seq_len=16, micro_batch_size=3, dp_rank=r, dp_size=size, max_rows=max_rows) for r in range(size)]
    batches = [list(r) for r in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    everything = [batch for turn in zip(*batches, strict=True) for batch in turn]
    alone = list(EvalRows(prefix, seq_len=16, micro_batch_size=3, max_rows=max_rows))
    for got, expected in zip(everything, alone, strict=False):
        assert as_dict(got) == as_dict(expected)
    for padding in everything[len(alone) :]:
        assert (padding.targets == -100).all()
    assert all(batch.tokens.shape == (3, 16) for batch in everything)
    assert [r for batch in everything for r in batch.rows.tolist()] == list(range(3 * len(everything)))
    assert list(map(as_dict, ranks[0])) == list(map(as_dict, batches[0]))


def test_evaluation_covers_all_targets(tmp_path):
    documents = random_documents(37, seed=5)
    rows = EvalRows(write(tmp_path / "d", documents), seq_len=16, micro_batch_size=4)
    targets = sum(int((b.targets != -100).sum()) for b in rows)
    # Every token but the first of each document is a target.
    assert targets == sum(len(d) - 1 for d in documents)


def test_a_dataset_shorter_than_a_row_can_be_evaluated(tmp_path):
    (batch,) = EvalRows(write(tmp_path / "d", [[5, 6, 7]]), seq_len=8, micro_batch_size=2)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [0] * 8]
    assert batch.targets.tolist() == [[6, 7] + [-100] * 6, [-100] * 8]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], list(range(8))]


def test_bytes_of_targets(tmp_path):
    tokenizer = ByteTokenizer()
    with DatasetWriter(tmp_path / "d", tokenizer) as writer:
        for text in ("abc", "de"):
            writer.add_text(text)
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    (batch,) = EvalRows(tmp_path / "d", seq_len=16, micro_batch_size=1)
    # The first byte of each document is given, and the ends are targets without bytes.
    assert count_bytes(batch.targets, lengths).item() == 2 + 1
    assert count_bytes(torch.full((2, 3), -100), lengths).item() == 0


# Errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seq_len": 10**6}, "fewer than one row of 1000000"),
        ({"seq_len": 1}, r"train\.seq_len 1"),
        ({"global_batch_size": 7}, "multiple of"),
        ({"global_batch_size": 0}, "multiple of"),
        ({"dp_size": 3}, "micro_batch_size=2 times 3 data-parallel ranks"),
        ({"micro_batch_size": 0}, "micro_batch_size 0"),
        ({"dp_rank": 2, "dp_size": 2}, "rank 2"),
        ({"vocab_size": 100}, r"model\.vocab_size"),
    ],
)
def test_impossible_settings_are_refused(prefix, options, match):
    with pytest.raises(UserError, match=match):
        loader(prefix, **options)


def test_no_dataset_and_nothing_to_evaluate_are_refused(tmp_path):
    with pytest.raises(UserError, match="no dataset"):
        loader([])
    with pytest.raises(UserError, match="nothing to predict"):
        EvalRows(write(tmp_path / "d", [[1]]), seq_len=8, micro_batch_size=1)
    with pytest.raises(UserError, match="max_rows 0"):
        EvalRows(write(tmp_path / "d", [[1, 2]]), seq_len=8, micro_batch_size=1, max_rows=0)


def test_an_id_outside_the_model_is_found_when_its_row_is_read(tmp_path):
    ids = np.full(160, 5, dtype="<u2")
    ids[100] = 300
    (tmp_path / "m.bin").write_bytes(ids.tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 160, 0, 0, 1)
    (tmp_path / "m.idx").write_bytes(index)
    source = loader(tmp_path / "m", vocab_size=257, global_batch_size=2)
    with pytest.raises(UserError, match="has id 300 at token 100, outside a vocabulary of 257"):
        list(iter(source.next_step, None))


def test_ids_between_the_tokenizer_and_a_padded_model_are_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes(np.full(64, 260, dtype="<u2").tobytes())
    (tmp_path / "m.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 64, 0, 0, 1))
    with pytest.raises(UserError, match="id 260 at token"):
        loader(tmp_path / "m", vocab_size=264, tokenizer=ByteTokenizer()).next_step()


def test_the_loader_is_fifty_times_faster_than_training_on_two_cores(prefix):
    source = loader(prefix, seq_len=256, micro_batch_size=16, global_batch_size=16)
    start = time.process_time()
    for _ in range(40):
        source.next_step()
    # Quickstart trains at about 10,000 tokens/s.
    assert 40 * 16 * 256 / (time.process_time() - start) > 500_000


def test_start_and_resume_cost_the_same_for_a_terabyte(tmp_path):
    documents, length = 4096, 2**27
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1)
    index += np.full(documents, length, dtype="<i4").tobytes()
    index += (np.arange(documents, dtype="<i8") * 2 * length).tobytes() + np.arange(documents + 1, dtype="<i8").tobytes()
    (tmp_path / "t.idx").write_bytes(index)
    try:
        with (tmp_path / "t.bin").open("wb") as file:
            file.truncate(2 * documents * length)
    except OSError:
        pytest.skip("the file system has no sparse files of 1 TB")
    start = time.process_time()
    source = loader(tmp_path / "t", seq_len=2048)
    source.load_state_dict({**source.state_dict(), "samples": 10**12 + 7})
    step = source.next_step()
    assert time.process_time() - start < 2
    assert step.token_count == 8 * 2048
