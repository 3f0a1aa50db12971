"""Decoding: one token after the other gives what the whole text gives, whatever is beside it; and what is chosen and printed."""

import dataclasses
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_corpus
from launches import ROOT, launch
from models import CPU, RECURRENT, TOPK, config_of, decoder_of, make_batch
from test_every_router import CASES, LEAKING, digest, finish_step, model_of, title
from tiny_run import words_for
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moe_train.data.tokenizer import ByteTokenizer
from moe_train.errors import UserError
from moe_train.generate import Predict, Prompt, Sampling, Written, check_cache, choose, generate, with_cache, without_cache
from moe_train.model.cache import Cache, Past
from moe_train.model.decoder import Decoder

SHAPES: list[dict[str, Any]] = [
    {"num_kv_heads": 1, "qk_norm": True, "head_dim": 4},
    {"num_dense_layers": 1, "shared_expert_size": 8, "tie_embeddings": True},
    {"moe_layer_freq": [1, 0, 1]},
    *({"block": "transformer_xl", "transformer_xl": {"attn_type": kind}} for kind in ("table", "relative", "absolute")),
]
LENGTHS = [7, 1, 4]  # of prompts in one batch
STEPS = 7


def lively(model: Decoder) -> Decoder:
    """With matrices large enough for attention and gates to tell tokens apart."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 0.0, 0.5, generator=generator)
    return model.eval()


def trained(case: dict[str, Any]) -> Decoder:
    """After steps that fill the routers' buffers."""
    model = lively(model_of(case))
    for seed in range(3):
        finish_step(model, plain(texts(seed)), targets=texts(seed + 1))
    return model


def texts(seed: int = 0) -> Tensor:
    """[3, longest prompt + STEPS]."""
    return torch.randint(0, 32, (3, max(LENGTHS) + STEPS), generator=torch.Generator().manual_seed(seed))


def plain(tokens: Tensor) -> Any:
    """Rows of one document each."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return make_batch(tokens, positions, torch.zeros_like(tokens))


def decode(model: Decoder) -> Callable[[Tensor, Cache], tuple[Tensor, Cache]]:
    def step(tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        output = model(cache.batch(tokens, torch.float64), cache=cache)
        assert output.logits.shape[:2] == (len(tokens), 1)
        return output.logits[:, 0], output.cache

    return step


def check_rows_alone(model: Decoder) -> None:
    """Prompts of different lengths in one batch, in two parts, then a token at a time: the logits of each text's own full forward."""
    step, rows = decode(model), texts()
    expected = [model(plain(row[None, : n + STEPS])).logits[0] for row, n in zip(rows, LENGTHS, strict=True)]
    padding = torch.tensor([max(LENGTHS) - n for n in LENGTHS])
    prompts = torch.stack(
        [torch.cat([row.new_full((p,), 9), row[:n]]) for row, n, p in zip(rows, LENGTHS, padding, strict=True)]
    )
    _, cache = step(prompts[:, :5], Cache(padding))  # some of it padding, some not
    logits, cache = step(prompts[:, 5:], cache)
    kept = [0, 1, 2]
    for t in range(STEPS):
        for i, row in enumerate(kept):
            torch.testing.assert_close(logits[i], expected[row][LENGTHS[row] + t - 1], rtol=0, atol=1e-10)
        if t == 4:  # a row ends
            kept = [2, 0]
            cache = cache.take(kept)
        new = torch.stack([rows[row, LENGTHS[row] + t] for row in kept])
        logits, cache = step(new[:, None], cache)
    assert cache.length == max(LENGTHS) + STEPS


# The model


@pytest.mark.parametrize("case", CASES, ids=title)
@torch.no_grad()
def test_every_token_has_the_logits_of_the_whole_text(case: dict) -> None:
    model, tokens = trained(case), texts()
    step, cache = decode(model), Cache(torch.zeros(3, dtype=torch.long))
    whole = model(plain(tokens)).logits
    for t in range(tokens.shape[1]):
        logits, cache = step(tokens[:, t : t + 1], cache)
        torch.testing.assert_close(logits, whole[:, t], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=title)
@torch.no_grad()
def test_rows_of_different_lengths_change_nothing(case: dict) -> None:
    check_rows_alone(trained(case))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("router", [TOPK, RECURRENT, {"name": "reinforce", "segment_size": 3}], ids=lambda r: r["name"])
@torch.no_grad()
def test_every_shape_of_model(router: dict, shape: dict) -> None:
    check_rows_alone(lively(decoder_of(config_of(router, **shape).model)))


def test_padding_is_a_document_of_its_own() -> None:
    start = Cache(torch.tensor([0, 2]))
    first = start.batch(torch.ones(2, 3, dtype=torch.long), torch.float64)
    assert first.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert first.doc_ids.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert first.segments.mask.int().tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]], [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    then = start.extend(3, {}).batch(torch.ones(2, 2, dtype=torch.long), torch.float64)
    assert then.positions.tolist() == [[3, 4], [1, 2]]
    assert then.doc_ids.tolist() == [[0, 0], [1, 1]]
    assert then.segments.mask.int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]], [[[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]]]


@torch.no_grad()
def test_a_cache_is_data() -> None:
    """Going on from it twice gives the same bits, and changes neither it nor the model."""
    model = trained({"name": "smear", "segment_size": 3})
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    step, tokens = decode(model), texts()
    _, cache = step(tokens[:, :5], Cache(torch.tensor([0, 3, 1])))
    leaves = tree_leaves(dataclasses.asdict(cache))
    before, state = [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)], digest(model)
    assert len(before) == 1 + 3 * (2 + 3)  # padding; keys, values and the three of the router for each layer
    one, other = (step(tokens[:, 5:7], cache) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert cache.length == 5
    assert all(torch.equal(a, b) for a, b in zip(before, [x for x in leaves if isinstance(x, Tensor)], strict=True))
    assert digest(model) == state
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == attributes


@torch.no_grad()
def test_a_text_goes_on_in_several_ways_in_any_order() -> None:
    """The first that goes on may use the memory behind what is kept; the others must not."""
    step, tokens = decode(trained(RECURRENT)), texts()
    _, cache = step(tokens[:, :5], Cache(torch.zeros(3, dtype=torch.long)))
    _, cache = step(tokens[:, 5:6], cache)
    ways = [(tokens[:, 6:7] + i) % 32 for i in range(3)]
    firsts = [step(way, cache) for way in ways]
    for way, (_, first) in reversed(list(zip(ways, firsts, strict=True))):
        logits, _ = step(tokens[:, 7:8], first)
        _, alone = step(torch.cat([tokens[:, :6], way], 1), Cache(torch.zeros(3, dtype=torch.long)))
        torch.testing.assert_close(logits, step(tokens[:, 7:8], alone)[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_columns_are_copied_when_their_memory_is_full_and_not_with_every_token() -> None:
    columns, moves = [torch.randn(2, 100, 3)], 0
    past = Past().extend((columns[0], -columns[0]))
    for _ in range(300):
        columns.append(torch.randn(2, 1, 3))
        before, past = past, past.extend((columns[-1], -columns[-1]))
        moves += past.seen[0].data_ptr() != before.seen[0].data_ptr()
        assert torch.equal(before.seen[0], torch.cat(columns[:-1], 1))
        assert torch.equal(past.seen[1], -torch.cat(columns, 1))
    assert moves == 2  # with the second token, and when there were 256


def test_a_cache_with_gradients_is_not_written_behind() -> None:
    one, two, three = (torch.randn(1, 1, 2, requires_grad=True) for _ in range(3))
    first = Past().extend((one,)).extend((two,))
    loss = first.seen[0].square().sum()
    with torch.no_grad():
        first.extend((three,))
    (loss + three.square().sum()).backward()
    for x in (one, two, three):
        torch.testing.assert_close(x.grad, 2 * x.detach())


@torch.no_grad()
def test_training_keeps_nothing() -> None:
    output = trained(RECURRENT)(plain(texts()))
    assert output.cache is None


# The loop


TOKENIZER = ByteTokenizer()
PROMPTS = [Prompt("to be", 1), Prompt("", 2), Prompt("or not to be, that", 3), Prompt("x", 1)]


@pytest.fixture(scope="module")
def speaker() -> Decoder:
    return lively(decoder_of(config_of(num_layers=2, vocab_size=260).model))


def cached(model: Decoder) -> Predict:
    return with_cache(decode(model), CPU)


def write_token_by_token(model: Decoder, prompt: Prompt, n: int, temperature: float, window: int) -> str:
    """The plainest sampling: a full forward over the last `window` tokens for each."""
    ids = [int(i) for i in TOKENIZER.encode(prompt.text)] or [TOKENIZER.eod]
    start, generator = len(ids), torch.Generator().manual_seed(prompt.seed)
    for _ in range(n):
        logits = model(plain(torch.tensor([ids[-window:]]))).logits[0, -1, :257]
        chosen = (
            logits.argmax()
            if temperature == 0
            else torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        )
        if int(chosen) == TOKENIZER.eod:
            break
        ids.append(int(chosen))
    return TOKENIZER.decode(ids[start:])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("window", [12, 64])
@torch.no_grad()
def test_texts_are_those_of_full_forwards_one_by_one(speaker: Decoder, window: int, temperature: float) -> None:
    """Also where the window moves on, at once for the longest prompt and later for others."""
    expected = [write_token_by_token(speaker, prompt, 16, temperature, window) for prompt in PROMPTS]
    sampling = Sampling(16, temperature)
    found = generate(cached(speaker), TOKENIZER, PROMPTS, sampling, window)
    assert [one.text for one in found] == expected
    assert [one.text for one in generate(cached(speaker), TOKENIZER, PROMPTS[::-1], sampling, window)] == expected[::-1]


@torch.no_grad()
def test_texts_without_a_cache_are_the_same(speaker: Decoder) -> None:
    slow = without_cache(lambda tokens: speaker(plain(tokens)).logits, CPU)
    found, expected = (generate(predict, TOKENIZER, PROMPTS, Sampling(9), 12) for predict in (slow, cached(speaker)))
    assert found == expected


@torch.no_grad()
def test_each_pass_has_one_new_token_of_each_row_that_goes_on(speaker: Decoder) -> None:
    shapes = []

    def counted(tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        shapes.append((tuple(tokens.shape), cache.length))
        logits, cache = decode(speaker)(tokens, cache)
        if cache.length == 8:
            logits[0, TOKENIZER.eod] = 1e9  # the first row ends after four tokens
        return logits, cache

    found = generate(with_cache(counted, CPU), TOKENIZER, [PROMPTS[0], Prompt("be", 4)], Sampling(9), window=9)
    # "be" fills the window with its seventh token; from then on all of the window is read again each time
    assert shapes == [((2, 5), 0), ((2, 1), 5), ((2, 1), 6), ((2, 1), 7), *(((1, 1), n) for n in (8, 9, 10, 11)), ((1, 9), 0)]
    assert [(one.tokens, one.reason) for one in found] == [(4, "end"), (9, "length")]


def script(texts_: dict[str, bytes]) -> Predict:
    """A model that goes on with these bytes, and then ends the document."""

    def predict(rows: list[list[int]], cache: Cache | None) -> tuple[Tensor, Cache | None]:
        logits = torch.zeros(len(rows), 260)
        logits[:, 257:] = 99.0  # rows of the embedding that no token has
        for row, out in zip(rows, logits, strict=True):
            start, text = next((s.encode(), t) for s, t in texts_.items() if bytes(row[: len(s)]) == s.encode())
            done = len(row) - len(start)
            out[text[done] if done < len(text) else TOKENIZER.eod] = 50.0
        return logits, None

    return predict


@pytest.mark.parametrize(
    ("stop", "written"),
    [
        ((), Written("one two, zwölf", 16, "end")),
        (("two",), Written("one ", 7, "stop")),
        (("o, ", "wo", "ö"), Written("one t", 7, "stop")),
        (("two", "one two"), Written("", 7, "stop")),
        (("wö",), Written("one two, z", 13, "stop")),
        (("prompt", "onet"), Written("one two, zwölf", 16, "end")),
    ],
)
def test_a_text_ends_before_the_first_stop_text(stop: tuple[str, ...], written: Written) -> None:
    found = generate(
        script({"prompt": "one two, zwölf".encode()}), TOKENIZER, [Prompt("prompt")], Sampling(99, 0.8, stop=stop), 99
    )
    assert found == [written]


def test_why_texts_end() -> None:
    predict = script({"a": b"1", "b": b"2 stop", "c": b"3333333333"})
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    found = generate(predict, TOKENIZER, prompts, Sampling(7, 0.0, stop=(" stop",)), 99)
    assert found == [Written("1", 2, "end"), Written("2", 6, "stop"), Written("3333333", 7, "length")]
    assert generate(predict, TOKENIZER, prompts, Sampling(0), 99) == [Written("", 0, "length")] * 3
    cut = generate(script({"a": "é".encode()}), TOKENIZER, [Prompt("a")], Sampling(1, 0.0), 99)
    assert cut == [Written("\ufffd", 1, "length")]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1, 1.0), [0.15, 0.5, 0.05, 0.3]),
        (Sampling(1, 0.5), [0.0616, 0.6849, 0.0068, 0.2466]),  # squares of the above, divided by their sum
        (Sampling(1, 1.0, top_k=2), [0, 0.625, 0, 0.375]),
        (Sampling(1, 1.0, top_k=1), [0, 1, 0, 0]),
        (Sampling(1, 1.0, top_k=9), [0.15, 0.5, 0.05, 0.3]),
        (Sampling(1, 1.0, top_p=0.79), [0, 0.625, 0, 0.375]),
        (Sampling(1, 1.0, top_p=0.81), [0.1579, 0.5263, 0, 0.3158]),
        (Sampling(1, 1.0, top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(1, 1.0, top_k=3, top_p=0.83), [0, 0.625, 0, 0.375]),  # of the three that are left, two have 0.842
        (Sampling(1, 0.0), [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_how_a_token_is_chosen(sampling: Sampling, expected: list[float]) -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[choose(logits, sampling, generator)] += 1
    assert ((counts > 0) == (torch.tensor(expected) > 0)).all()
    torch.testing.assert_close(counts / 2000, torch.tensor(expected).float(), rtol=0, atol=0.04)


def test_equally_likely_tokens_are_counted_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    assert {choose(torch.zeros(5), Sampling(1, 1.0, top_k=2), generator) for _ in range(50)} == {0, 1}


# What cannot use a cache


def test_every_causal_router_can_use_a_cache() -> None:
    for case in CASES:
        check_cache(config_of(case))


@pytest.mark.parametrize("case", LEAKING, ids=title)
def test_what_looks_ahead_is_refused(case: dict) -> None:
    with pytest.raises(
        UserError, match=rf"^model\.router\.name={case['name']}: model.*causal=false.*; train with .*--no-cache$"
    ):
        check_cache(config_of(case))


def test_every_reason_is_said() -> None:
    config = config_of({"name": "topk"}, capacity_factor=1.5)
    parallel = config.parallel.model_copy(update={"tp": 2, "pp": 3, "cp": 4, "ep": 5})
    with pytest.raises(UserError) as error:
        check_cache(config.model_copy(update={"parallel": parallel}))
    lines = str(error.value).split("\n  ")
    assert [line.split(":")[0] for line in lines] == [
        "model.capacity_factor=1.5",
        "parallel.pp=3",
        "parallel.tp=2",
        "parallel.cp=4",
    ]
    assert "model.capacity_factor=null" in lines[0]
    assert all("--no-cache" in line for line in lines)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    prefix = write_corpus(folder / "text")
    done = launch("pretrain", *words_for(prefix), "train.steps=2", f"run.dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return str(folder / "run")


def rows_of(*words: str, ranks: int = 1) -> list[dict[str, Any]]:
    done = launch("generate", *words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert " tokens/s" in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command(run: str, tmp_path: Path) -> None:
    """Prompts from everywhere, several samples, in batches that mix them; and each as it is alone, without a cache, and where two
    ranks share parameters and experts."""
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("class\n\n")
    objects.write_text('"im\\nport"\n{"prompt": "for", "other": 1}\n')
    options = ["--max-tokens", "34", "--top-k", "50", "--top-p", "0.9", "--stop", "\x7f"]  # more than train.seq_len
    words = [run, "--prompt", "def f(", *options, "--batch-size", "3"]
    words += ["--prompts-file", str(lines), "--prompts-file", str(objects)]
    rows = rows_of(*words, "--num-samples", "2", "--seed", "5")
    prompts = ["def f(", "class", "", "im\nport", "for"]
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, s) for p in prompts for s in (0, 1)]
    assert all((row["tokens"] == 34) == (row["reason"] == "length") for row in rows)
    assert "length" in {row["reason"] for row in rows}
    alone = launch("generate", run, "--prompt", "def f(", *options, "--seed", "6")
    assert alone.stdout == "def f(" + rows[1]["text"] + "\n"
    assert rows_of(*words, "--seed", "5", "parallel.ep=2", ranks=2) == rows[::2]
    assert rows_of(*words, "--seed", "5", "--no-cache") == rows[::2]


def test_a_model_that_cannot_use_a_cache_is_refused(run: str) -> None:
    words = [run, "--prompt", "x", "--max-tokens", "3", "model.capacity_factor=1.0"]
    done = launch("generate", *words)
    assert done.returncode == 2
    assert "\nerror: model.capacity_factor=1.0: " in done.stderr
    assert "Traceback" not in done.stderr
    assert launch("generate", *words, "--no-cache").returncode == 0


def test_a_run_that_cannot_use_a_cache_samples_all_the_same(tmp_path: Path) -> None:
    router = ["model.router.name=smear", "model.router.causal=false", "model.hidden_size=32", "model.num_layers=1"]
    words = [word for word in words_for(write_corpus(tmp_path / "text")) if "router_size" not in word]
    done = launch("pretrain", *words, *router, "train.steps=1", "parallel.tp=2", f"run.dir={tmp_path / 'run'}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "sample.txt").read_bytes()) > len(b"def ")
    assert done.stderr.count("not a causal model: model.router.causal=false") == 1  # said at the start, by one rank


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--top-p", "0"], "--top-p must be above 0 and at most 1"),
        (["--top-p", "nan"], "--top-p must be"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--max-tokens", "-1"], "--max-tokens must be at least 0"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--seed", str(2**70)], "--seed must be"),
        (["--stop", ""], "--stop must not be empty"),
        (["--prompts-file", "{tmp}/gone"], "cannot be read as prompts"),
        (["--prompts-file", "{tmp}/binary"], "cannot be read as prompts"),
        (["--prompts-file", "{tmp}/bad.jsonl"], "bad.jsonl:2: holds no prompt"),
        (["--prompts-file", "{tmp}/other.jsonl"], "other.jsonl:1: holds no prompt"),
    ],
)
def test_mistakes_are_named(words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.jsonl").write_text('"good"\n{"prompt": 3}\n')
    (tmp_path / "other.jsonl").write_text("def f(\n")
    main = runpy.run_path(str(ROOT / "launch" / "generate.py"))["run"]
    with pytest.raises((UserError, SystemExit)) as error:
        main([str(tmp_path), *(word.format(tmp=tmp_path) for word in words)])
    assert part in f"{error.value} {capsys.readouterr().err}"
