"""Text of a label: what the routers that read labels are told while decoding."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpora import write_corpus
from models import CPU, config_of, decoder_of, make_batch

from moe_train.cli import merge, parse
from moe_train.errors import UserError
from moe_train.generate import label_number, with_cache
from moe_train.model.cache import Cache
from moe_train.model.decoder import Decoder


def model_of(router: str) -> Decoder:
    model = decoder_of(config_of({"name": router}, init_std=0.5).model).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("skills"):  # they start nearly equal
            p.data += torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@pytest.mark.parametrize("router", ["tag", "latent_skills"])
def test_decoding_a_label_is_the_forward_over_rows_of_that_label(router: str) -> None:
    model = model_of(router)
    row = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(0))
    batch = make_batch(row[None], torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.int64))

    def decode(tokens: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        output = model(cache.batch(tokens, torch.float64), cache=cache)
        return output.logits[:, 0], output.cache

    found = []
    for label in (0, 1, 3):
        whole = model(replace(batch, labels=torch.full((1, 8), label))).logits[0, -1]
        predict = with_cache(decode, CPU, label)
        _, cache = predict([row[:7].tolist()], None)
        logits, _ = predict([row.tolist()], cache)
        torch.testing.assert_close(logits[0], whole, rtol=1e-9, atol=1e-9)
        found.append(whole)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


def test_a_label_is_a_name_of_the_training_data_or_a_number(tmp_path: Path) -> None:
    run = {"model": {"router": {"name": "tag"}}, "data": {"train": write_corpus(tmp_path / "text")}}
    config = parse(run, "test")
    assert [label_number(config, label) for label in ("unknown", "a", "b", "2", "17")] == [0, 1, 2, 2, 17]
    with pytest.raises(UserError, match=r"--label=c: no label of data\.train, which has unknown, a, b; give one of them"):
        label_number(config, "c")
    other = parse(merge(run, {"model": {"router": {"name": "topk"}}}), "test")
    with pytest.raises(UserError, match="--label=a: router topk does not read the labels of documents; leave it out"):
        label_number(other, "a")
