"""Datasets that Megatron-LM's own code (megatron-core) and ours write for each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moe_train.data.indexed import IndexedDataset
from moe_train.data.loader import EvalRows
from moe_train.data.tokenizer import ByteTokenizer
from moe_train.data.words import WordTokenizer
from moe_train.data.writer import DatasetWriter

pytestmark = pytest.mark.integration

TEXTS = ["def f(x):\n    return x\n", "Größe 中文", "x" * 5000]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("wide", [False, True], ids=["uint16", "int32"])
def test_megatron_reads_ours(tmp_path: Path, mmap: bool, wide: bool) -> None:
    words = [f"w{i}" for i in range(70_000)] if wide else []
    tokenizer = WordTokenizer(["<eos>", "<unk>", *words]) if wide else ByteTokenizer()
    texts = [" ".join(words[i::9_999]) for i in range(3)] if wide else TEXTS
    with DatasetWriter(tmp_path / "ours", tokenizer) as writer:
        for text in texts:
            writer.add_text(text)
    theirs = MegatronDataset(str(tmp_path / "ours"), mmap=mmap)
    assert len(theirs) == len(texts)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    assert theirs.index.dtype == (np.int32 if wide else np.uint16)
    for i, text in enumerate(texts):
        assert theirs[i].tolist() == [*tokenizer.encode(text), tokenizer.eod]
    assert theirs.get(2, offset=3, length=4).tolist() == tokenizer.encode(texts[2])[3:7].tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(tmp_path: Path, dtype: type[np.integer]) -> None:
    draw = np.random.default_rng(0)
    documents = [[5, 7], [1], [3, 0, 4], [200]]  # lengths of the sequences of each document
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    expected = []
    for lengths in documents:
        ids = draw.integers(0, 257, sum(lengths))
        builder.add_document(torch.from_numpy(ids), lengths)
        expected.append(ids.tolist())
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedDataset(tmp_path / "theirs", vocab_size=257)
    assert ours.num_sequences == sum(map(len, documents))
    assert [ours.document(i).tolist() for i in range(len(ours))] == expected
    rows = EvalRows(tmp_path / "theirs", seq_len=16, micro_batch_size=4, vocab_size=257)
    tokens = torch.cat([micro.tokens.flatten() for micro in rows])[: ours.num_tokens]
    assert tokens.tolist() == [i for document in expected for i in document]
    assert sum(int((micro.targets >= 0).sum()) for micro in rows) == ours.num_tokens - len(documents)
