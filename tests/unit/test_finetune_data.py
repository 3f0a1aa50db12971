"""Examples for fine-tuning: what of them is learned, how they share rows, in which order they come, and what is said of wrong ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning import copies, write_examples
from hypothesis import given
from hypothesis import strategies as st
from models import RECURRENT, TOPK, config_of, decoder_of, make_batch

from moe_train.data.stream import NO_TARGET
from moe_train.data.tokenizer import ByteTokenizer
from moe_train.errors import UserError
from moe_train.finetune.examples import Examples, first_part, gather, read_instructions
from moe_train.finetune.packing import PackedLoader, PackedRows, pack
from moe_train.finetune.templates import ALPACA, ALPACA_INPUT

BYTES = ByteTokenizer()
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4."},
]


def read(path: Path | str, seq_len: int = 512, too_long: Any = "truncate", empty: Any = "error") -> Examples:
    counts: Counter[str] = Counter()
    return gather(read_instructions(str(path), BYTES, empty, counts), counts, str(path), seq_len, too_long, first_part)


def as_dict(micro: Any) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in vars(micro).items()}


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    return read(write_examples(tmp_path / "some.json", copies(50)))


# What is learned


def test_an_instruction_has_alpacas_prompt_and_its_response_alone_is_learned(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1+1", "output": "two"},
        {"instruction": "Greet.", "input": "", "output": "Hé"},
        {"instruction": "Greet.", "output": "Hello", "text": "ignored"},
    ]
    found = read(write_examples(tmp_path / "some.json", records))
    prompts = [ALPACA_INPUT.format(instruction="Add.", input="1+1"), *[ALPACA.format(instruction="Greet.")] * 2]
    for i, (prompt, response) in enumerate(zip(prompts, ["two", "Hé", "Hello"], strict=True)):
        here = slice(found.starts[i], found.starts[i + 1])
        tokens, targets = found.tokens[here], found.targets[here]
        assert BYTES.decode(tokens) == prompt + response
        assert BYTES.decode(targets[targets != NO_TARGET][:-1]) == response
        assert targets[-1] == BYTES.eod
        assert (targets[: len(prompt.encode()) - 1] == NO_TARGET).all()
    assert found.target_counts.tolist() == [4, 4, 6]
    assert prompts[0].startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context."
    )
    assert prompts[1].endswith("### Instruction:\nGreet.\n\n### Response:")


def test_every_answer_of_a_chat_is_learned_and_nothing_else(tmp_path: Path) -> None:
    found = read(write_examples(tmp_path / "chat.jsonl", [{"messages": CHAT}]))
    whole = "<|system|>\nBe short.\n<|user|>\n1+1?\n<|assistant|>\n2<|user|>\n2+2?\n<|assistant|>\n4."
    assert BYTES.decode(found.tokens) == whole
    learned = found.targets[found.targets != NO_TARGET].tolist()
    assert learned == [ord("2"), BYTES.eod, ord("4"), ord("."), BYTES.eod]
    before = [BYTES.decode(found.tokens[: i + 1])[-2:] for i in np.flatnonzero(found.targets != NO_TARGET)]
    assert before == [">\n", "\n2", ">\n", "\n4", "4."]


@pytest.mark.parametrize(
    ("policy", "lengths", "said"),
    [
        ("truncate", [200, 200, 180], "3 examples, 1 longer than 200 tokens truncated"),
        ("skip", [200, 180], "1 longer than 200 tokens skipped"),
    ],
)
def test_long_examples_are_cut_or_left_out_and_counted(policy: str, lengths: list[int], said: str, tmp_path: Path) -> None:
    bare = len(ALPACA.format(instruction="x"))
    records = [{"instruction": "x", "output": "y" * (n - bare)} for n in (260, 200, 180)]
    found = read(write_examples(tmp_path / "some.json", records), 200, policy)
    assert found.lengths.tolist() == lengths
    assert found.told.endswith(said)
    with pytest.raises(
        UserError, match=r"some.json: entry 1: 260 tokens are more than train.seq_len=200; raise it, or set sft.too_long"
    ):
        read(tmp_path / "some.json", 200, "error")


def test_what_has_no_response_left_is_left_out(tmp_path: Path) -> None:
    records = [{"instruction": "x" * 200, "output": "y"}, {"instruction": "x", "output": "y"}]
    found = read(write_examples(tmp_path / "some.json", records), 150)
    assert len(found) == 1
    assert "1 longer than 150 tokens truncated, 1 of them left out, as no response was left" in found.told
    with pytest.raises(UserError, match="no example is left"):
        read(write_examples(tmp_path / "none.json", records[:1]), 150)


def test_empty_responses_are_a_choice(tmp_path: Path) -> None:
    path = write_examples(tmp_path / "some.jsonl", [{"instruction": "x", "output": "y"}, {"instruction": "z", "output": " "}])
    with pytest.raises(UserError, match=r"some.jsonl:2: field 'output' of a response is empty; set sft.empty_response"):
        read(path)
    assert "1 with an empty response skipped" in read(path, empty="skip").told
    assert read(path, empty="keep").target_counts.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"instruction": "x", "output": "y"}, 3]', r"some.json: entry 2: must be a JSON object, not int"),
        (
            '[{"instruction": "x", "output": "y"}, {"instruction": "x"}]',
            r"some.json: entry 2: no field 'output' among 'instruction'",
        ),
        ('[{"instruction": "x", "output": 3}]', "entry 1: field 'output' must be text, not int"),
        ('[{"instruction": " ", "output": "y"}]', "entry 1: field 'instruction' is empty"),
        ('[{"instruction": "x", "input": [], "output": "y"}]', "entry 1: field 'input' must be text, not list"),
        ('[{"prompt": "x"}]', "entry 1: no field 'instruction' among 'prompt'"),
        ('[{"instruction": "\\ud800", "output": "y"}]', "entry 1: text has a lone surrogate"),
        ('{"instruction": "x", "output": "y"}', "some.json: must be a JSON list of objects"),
        ('[{"instruction": "x"', "some.json: not valid JSON"),
        ("[]", "no example is left"),
        ('[{"messages": []}]', "entry 1: field 'messages' must be a list"),
        ('[{"messages": [3]}]', "entry 1: message 1: must be an object"),
        (
            '[{"messages": [{"role": "human", "content": "x"}]}]',
            "message 1: field 'role' is 'human'; the roles are system, user, assistant",
        ),
        ('[{"messages": [{"role": "user", "content": ["x"]}]}]', "message 1: field 'content' must be text, not list"),
        ('[{"messages": [{"role": "user", "content": "x"}]}]', "entry 1: the last message must be the assistant's"),
        (
            '[{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}]',
            "message 2: field 'role' is 'system'",
        ),
        ('[{"messages": [{"content": "x"}]}]', "message 1: no field 'role'"),
        ('[{"messages": [{"role": "assistant", "content": ""}]}]', "entry 1: field 'content' of a response is empty"),
    ],
)
def test_a_wrong_entry_is_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read(tmp_path / "some.json")


def test_a_wrong_line_and_a_wrong_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"instruction": "x", "output": "y"}\n\n{"instruction"\n')
    with pytest.raises(UserError, match=r"some.jsonl:3: not valid JSON"):
        read(tmp_path / "some.jsonl")
    (tmp_path / "some.jsonl").write_bytes(b'{"instruction": "\xff", "output": "y"}\n')
    with pytest.raises(UserError, match=r"some.jsonl:1: not valid JSON .*utf-8"):
        read(tmp_path / "some.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "other.jsonl")
    (tmp_path / "some.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"not a .json or .jsonl file"):
        read(tmp_path / "some.parquet")


# Rows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.randoms())
def test_packing_puts_each_example_into_one_row_that_it_fits(lengths: list[int], random: Any) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack(lengths, order, 20)
    assert sorted(number for row in rows for number in row) == sorted(order)
    sums = sorted(sum(lengths[number] for number in row) for row in rows)
    assert sums[-1] <= 20
    if len(sums) > 1:
        assert sums[0] + sums[1] > 20  # two that fit together would have been one: no more than twice the least number of rows
    assert rows == best_fit(lengths, order, 20)


def best_fit(lengths: list[int], order: list[int], size: int) -> list[list[int]]:
    """Each into the row with the least room that is enough, the first one of equals."""
    rows: list[list[int]] = []
    for number in order:
        room = [size - sum(lengths[other] for other in row) for row in rows]
        enough = [(left, row) for row, left in enumerate(room) if left >= lengths[number]]
        if not enough:
            rows.append([])
        rows[min(enough)[1] if enough else -1].append(number)
    return rows


@pytest.mark.parametrize("packed", [True, False])
def test_rows_hold_every_example_once_and_learn_nothing_but_responses(packed: bool, examples: Examples) -> None:
    rows = PackedRows(examples, seq_len=512, micro_batch_size=4, dp_rank=0, dp_size=1, packed=packed)
    documents: Counter[tuple[int, ...]] = Counter()
    targets = 0
    for micro in rows:
        assert micro.tokens.shape == (4, 512)
        targets += int((micro.targets != NO_TARGET).sum())
        for tokens, wanted, positions, ids in zip(micro.tokens, micro.targets, micro.positions, micro.doc_ids, strict=True):
            for i in range(int(ids.max()) + 1):
                here = ids == i
                assert positions[here].tolist() == list(range(int(here.sum())))
                if (wanted[here] != NO_TARGET).any():
                    documents[tuple(tokens[here].tolist() + wanted[here].tolist())] += 1
                    assert wanted[here][-1] == BYTES.eod
    own = [slice(a, b) for a, b in zip(examples.starts, examples.starts[1:], strict=False)]
    assert documents == Counter(tuple(examples.tokens[at].tolist() + examples.targets[at].tolist()) for at in own)
    assert targets == examples.target_counts.sum() == sum(len(one["output"]) + 1 for one in copies(50))
    assert rows.num_rows == (50 if not packed else 25)


@pytest.mark.parametrize("router", [TOPK, RECURRENT])
def test_a_packed_batch_has_the_gradients_of_its_documents(router: dict[str, Any]) -> None:
    """In fp64; the balance loss counts over the step before, because over the row it couples documents by design."""
    lengths, rng = [5, 7, 9, 3, 11], np.random.default_rng(0)
    starts = np.cumsum([0, *lengths])
    tokens = rng.integers(0, 32, starts[-1], dtype=np.int32)
    targets = np.where(rng.random(starts[-1]) < 0.5, np.roll(tokens, -1), NO_TARGET).astype(np.int32)
    targets[starts[1:] - 1] = tokens[starts[1:] - 1]
    source = Examples(tokens, targets, starts, "")
    loader = PackedLoader(source, seq_len=16, micro_batch_size=4, global_batch_size=4, seed=0, epochs=1)
    step = loader.next_step()
    assert step.token_count == 64
    assert step.target_count == (targets != NO_TARGET).sum()
    [micro] = step.microbatches
    config = config_of({**router, "balance_scope": "global_batch"}).model
    packed, single = decoder_of(config), decoder_of(config)
    counts = (step.token_count, step.target_count)
    packed(make_batch(micro.tokens, micro.positions, micro.doc_ids, *counts), micro.targets).loss.backward()
    documents = 0
    for row in range(4):
        for i in range(int(micro.doc_ids[row].max()) + 1):
            here = micro.doc_ids[row] == i
            alone, wanted = micro.tokens[row, here][None], micro.targets[row, here][None]
            positions = torch.arange(alone.shape[1])[None]
            single(make_batch(alone, positions, torch.zeros_like(positions), *counts), wanted).loss.backward()
            documents += int((wanted != NO_TARGET).any())
    assert documents == len(lengths)
    for (name, one), (_, other) in zip(packed.named_parameters(), single.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-13, msg=name)


# Order


def loader(examples: Examples, **options: Any) -> PackedLoader:
    sizes = {"seq_len": 512, "micro_batch_size": 1, "global_batch_size": 8, "seed": 3, "epochs": 3}
    return PackedLoader(examples, **(sizes | options))


def test_epochs_see_each_row_once_and_the_last_step_is_filled_with_rows_without_targets(examples: Examples) -> None:
    source = loader(examples)
    rows = source.rows.num_rows
    assert rows == 25
    assert source.steps == 10  # 75 rows in eights
    steps = [source.next_step() for _ in range(10)]
    batches = [micro for step in steps for micro in step.microbatches]
    assert [number for micro in batches for number in micro.rows.tolist()] == list(range(80))
    learned = [tuple(micro.targets[micro.targets != NO_TARGET].tolist()) for micro in batches]
    first, second = Counter(learned[:25]), Counter(learned[25:50])
    assert first == second == Counter(learned[50:75])
    assert learned[:25] != learned[25:50]
    assert learned[75:] == [()] * 5
    assert sum(step.target_count for step in steps) == 3 * examples.target_counts.sum()
    for step in steps:
        assert step.target_count == sum(int((micro.targets != NO_TARGET).sum()) for micro in step.microbatches) > 0
        assert step.token_count == 8 * 512
    with pytest.raises(UserError, match=r"raise sft\.epochs"):
        source.next_step()


def test_the_seed_decides_what_shares_a_row_and_the_order_of_rows(examples: Examples) -> None:
    made, orders = [], []
    for seed in (3, 3, 4):
        source = loader(examples, seed=seed)
        learned = [tuple(micro.targets[micro.targets != NO_TARGET].tolist()) for micro in source.rows]
        seen = [micro for _ in range(3) for micro in source.next_step().microbatches]
        made.append(set(learned))
        orders.append([learned.index(tuple(micro.targets[micro.targets != NO_TARGET].tolist())) for micro in seen])
    assert made[0] == made[1] != made[2]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_together_get_the_step_of_one(size: int, examples: Examples) -> None:
    one, ranks = loader(examples), [loader(examples, dp_rank=rank, dp_size=size) for rank in range(size)]
    for _ in range(10):
        whole, parts = one.next_step(), [rank.next_step() for rank in ranks]
        assert {(part.token_count, part.target_count) for part in parts} == {(whole.token_count, whole.target_count)}
        for j, micro in enumerate(whole.microbatches):
            assert as_dict(parts[j % size].microbatches[j // size]) == as_dict(micro)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_resuming_on_other_ranks_goes_on_exactly(size: int, examples: Examples) -> None:
    source = loader(examples, dp_rank=0, dp_size=1)
    states, steps = [], []
    for _ in range(10):
        states.append(json.loads(json.dumps(source.state_dict())))
        steps.append(source.next_step())
    for at in (0, 3, 9):
        ranks = [loader(examples, dp_rank=rank, dp_size=size) for rank in range(size)]
        for rank in ranks:
            rank.load_state_dict(states[at])
        for step in steps[at:]:
            parts = [rank.next_step() for rank in ranks]
            for j, micro in enumerate(step.microbatches):
                assert as_dict(parts[j % size].microbatches[j // size]) == as_dict(micro)


def test_a_place_in_other_examples_is_refused(examples: Examples, tmp_path: Path) -> None:
    state = loader(examples).state_dict()
    other = read(write_examples(tmp_path / "other.json", copies(50, seed=1)))
    for source, says in (
        (loader(other), "the content of sft.train="),
        (loader(examples, seed=4), "run.seed=4: was 3"),
        (loader(examples, packed=False), "sft.pack=False: was True"),
        (loader(examples, seq_len=1024), "train.seq_len=1024: was 512"),
        (loader(examples, global_batch_size=16), "train.global_batch_size=16: was 8"),
    ):
        with pytest.raises(UserError, match=says):
            source.load_state_dict(state)
    for wrong in (None, {}, {"version": 1, "samples": 8, "seed": 3, "seq_len": 512, "data": []}):
        with pytest.raises(UserError, match="not saved by fine-tuning"):
            loader(examples).load_state_dict(wrong)
    for samples in (-1, True, 2**60, "8"):
        with pytest.raises(UserError, match="no place in the data"):
            loader(examples).load_state_dict(state | {"samples": samples})
    with pytest.raises(UserError, match="must be a multiple"):
        loader(examples, dp_size=3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_sees_each_example_once_on_any_number_of_ranks(size: int, examples: Examples) -> None:
    ranks = [PackedRows(examples, seq_len=512, micro_batch_size=2, dp_rank=r, dp_size=size) for r in range(size)]
    batches = [list(rank) for rank in ranks]
    assert len({len(found) for found in batches}) == 1
    targets = sum(int((micro.targets != NO_TARGET).sum()) for found in batches for micro in found)
    assert targets == examples.target_counts.sum()
    few = PackedRows(examples, seq_len=512, micro_batch_size=2, dp_rank=0, dp_size=1, max_rows=3)
    assert sum(int((m.targets != NO_TARGET).sum()) for m in few) == few.targets[:3].sum()
