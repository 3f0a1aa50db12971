"""The default corpus: the same bytes every time, splits without a common file, nothing done twice."""

import concurrent.futures
import multiprocessing

import pytest

from moe_train.data import corpus
from moe_train.data.corpus import SPLITS, build_default_corpus, read_sources, train_default_sentencepiece
from moe_train.data.indexed import IndexedDataset, load_dataset_tokenizer
from moe_train.data.loader import Loader
from moe_train.data.tokenizer import ByteTokenizer
from moe_train.errors import UserError

PINNED = {"argparse.py": "train", "operator.py": "valid", "shutil.py": "test"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_default_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def few():
    """A tenth of the sources, for what is about the machinery and not the text."""
    return read_sources()[::10]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder):
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*.*") if p.name != ".lock"}


def test_the_corpus_is_the_library_without_tests():
    sources = read_sources()
    names = [s.name for s in sources]
    assert names == sorted(set(names))
    assert 8e6 < sum(len(s.text) for s in sources) < 30e6
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py", "pydoc_data/topics/if"} <= set(names)
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(name.split("/"))
        assert "_sysconfigdata" not in name
    assert names.count("pydoc_data/topics.py") == 0


def test_splits_have_the_documents_of_their_names_and_no_common_one(built):
    sources = read_sources()
    tokenizer = ByteTokenizer()
    for split in SPLITS:
        dataset = IndexedDataset(built[split])
        expected = [s for s in sources if s.split == split and s.text]
        assert len(dataset) == len(expected)
        for i, source in enumerate(expected):
            assert tokenizer.decode_bytes(dataset.document(i)) == source.text
            assert dataset.label_names[dataset.label(i)] == source.label
    by_split = [{s.name for s in sources if s.split == split} for split in SPLITS]
    assert sum(map(len, by_split)) == len(set.union(*by_split)) == len(sources)


def test_splits_have_their_shares(built):
    sizes = [IndexedDataset(built[split]).sidecar.num_bytes for split in SPLITS]
    assert 0.85 < sizes[0] / sum(sizes) < 0.97
    assert min(sizes[1:]) > 0.02 * sum(sizes)


def test_a_file_stays_in_its_split_for_ever():
    assert {s.name: s.split for s in read_sources() if s.name in PINNED} == PINNED


def test_labels_are_few_and_numbered_alike(built):
    names = {IndexedDataset(prefix).label_names for prefix in built.values()}
    (labels,) = names
    assert labels[0] == "unknown"
    assert {"modules", "pydoc", "asyncio"} <= set(labels)
    assert len(labels) < 60


def test_two_builds_are_equal_byte_for_byte(built, tmp_path):
    build_default_corpus(tmp_path)
    assert files(tmp_path / "bytes") == files(built["train"].parent)


def test_what_is_there_is_kept_and_what_is_damaged_is_made_again(few, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "read_sources", lambda: few)
    prefixes = build_default_corpus(tmp_path)
    before = stamps(tmp_path)
    assert build_default_corpus(tmp_path) == prefixes
    assert stamps(tmp_path) == before
    content = (tmp_path / "bytes/valid.bin").read_bytes()
    (tmp_path / "bytes/valid.bin").write_bytes(content[:-1])
    (tmp_path / "bytes/test.idx").unlink()
    build_default_corpus(tmp_path)
    assert (tmp_path / "bytes/valid.bin").read_bytes() == content
    assert IndexedDataset(prefixes["test"]).num_tokens > 0
    assert stamps(tmp_path)[tmp_path / "bytes/train.bin"] == before[tmp_path / "bytes/train.bin"]


def test_other_sources_are_built_again(few, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "read_sources", lambda: few)
    first = IndexedDataset(build_default_corpus(tmp_path)["train"]).num_tokens
    changed = [s for s in few if s.split != "train"] + [s for s in few if s.split == "train"][:3]
    monkeypatch.setattr(corpus, "read_sources", lambda: changed)
    assert IndexedDataset(build_default_corpus(tmp_path)["train"]).num_tokens < first


def test_sentencepiece_corpora_live_beside_and_share_documents(few, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "read_sources", lambda: few)
    plain = build_default_corpus(tmp_path)
    model = train_default_sentencepiece(tmp_path, 1000)
    pieces = build_default_corpus(tmp_path, model)
    assert IndexedDataset(plain["train"]).num_tokens > 2 * IndexedDataset(pieces["train"]).num_tokens
    for split in SPLITS:
        a, b = IndexedDataset(plain[split]), IndexedDataset(pieces[split])
        assert a.sidecar.num_bytes == b.sidecar.num_bytes
        tokenizer = load_dataset_tokenizer(pieces[split])
        assert tokenizer.decode_bytes(b.document(0)) == ByteTokenizer().decode_bytes(a.document(0))
    assert train_default_sentencepiece(tmp_path, 1000).read_bytes() == (tmp_path / "sentencepiece-1000.model").read_bytes()


def test_processes_may_build_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        results = list(pool.map(build_default_corpus, [tmp_path] * 2))
    assert results[0] == results[1]
    for prefix in results[0].values():
        assert IndexedDataset(prefix).num_tokens > 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_corpus_trains(built):
    step = Loader(built["train"], seq_len=256, micro_batch_size=4, global_batch_size=8, seed=0, vocab_size=257).next_step()
    assert step.microbatches[0].tokens.shape == (4, 256)


def test_an_interpreter_without_sources_and_a_read_only_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the default corpus"):
        build_default_corpus(tmp_path / "file")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="too few for the default corpus"):
        build_default_corpus(tmp_path / "new")
    assert not (tmp_path / "new").exists()
