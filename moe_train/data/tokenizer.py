"""Tokenizers behind one small interface: text to ids and back. Bytes and SentencePiece are here and lose nothing of any text.

The others have files of their own: characters.py, words.py (which keeps words and lines only) and pretrained.py (tokenizer.json).

Every tokenizer says how many bytes of text each id stands for, so that a loss per token becomes bits per byte:
`nats / ln 2 / byte_lengths[targets].sum()`. Ids that stand for no text (end of document) have length 0.
"""

import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from moe_train.errors import UserError
from moe_train.files import write_atomically

Ids = npt.NDArray[np.integer]

# Text is handed to the SentencePiece trainer in pieces of about this size: it skips "sentences" above max_sentence_length,
# and a piece of several lines lets it learn tokens such as ":\n", which lines alone would not.
CHUNK_CHARACTERS = 2000
MAX_TRAINING_CHUNKS = 200_000
MERGED_AT_ONCE = 1000  # bytes of a text that SentencePiece gets at a time, where it can be cut


class Tokenizer(ABC):
    """Text to ids in [0, vocab_size) and back. `decode_bytes(encode(x)) == x` for every text x that `encode` takes.

    Where a tokenizer cannot keep that promise, its class says what is lost.
    """

    name: str
    suffix: str  # of the file that `save` writes beside a dataset; "" when the name alone says everything
    vocab_size: int
    eod: int  # end-of-document id, which `encode` never produces

    @abstractmethod
    def encode(self, text: str | bytes) -> Ids:
        """Return the ids of a text, 1-D. Raises UserError for a str with lone surrogates, and for what has no ids."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int] | Ids) -> bytes:
        """Return the bytes the ids stand for; special ids stand for none. Raises UserError for ids out of range."""

    @abstractmethod
    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return [vocab_size], the bytes of text behind each id: 0 for special ids."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids: equal fingerprints, equal ids."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load_tokenizer` reads back to an equal tokenizer."""

    def cut(self, text: bytes) -> int:
        """Return the last place where `text` may be cut so that the ids of both parts are those of the whole, whatever follows it.

        0 where there is none, or none is known: then a document must be encoded whole.
        """
        return 0

    def decode(self, ids: Iterable[int] | Ids) -> str:
        """Return the text of the ids; bytes that are no valid UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _checked(self, ids: Iterable[int] | Ids) -> npt.NDArray[np.int64]:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
        wrong = array[(array < 0) | (array >= self.vocab_size)]
        if wrong.size:
            raise UserError(f"token id {wrong[0]} is outside the {self.vocab_size} ids of the {self.name} tokenizer")
        return array


class PieceTokenizer(Tokenizer):
    """A tokenizer whose ids stand for pieces of text, and whose file is everything that decides them."""

    _pieces: list[bytes]  # of each id; special ids have none
    content: bytes  # the file that `save` writes

    def decode_bytes(self, ids: Iterable[int] | Ids) -> bytes:
        """Return the pieces' bytes, one after the other."""
        return b"".join([self._pieces[i] for i in self._checked(ids).tolist()])

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the length of each piece, [vocab_size]."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the file that `save` writes."""
        return "sha256-" + hashlib.sha256(self.content).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        write_atomically(path, self.content)


def utf8(text: str | bytes) -> bytes:
    """Return a text in UTF-8; bytes stay as they are. Raises UserError for a str with lone surrogates."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text has a lone surrogate at character {error.start}; pass bytes or replace it") from None


class ByteTokenizer(Tokenizer):
    """One id per byte, and one more for the end of a document."""

    name = "bytes"
    suffix = ""
    vocab_size = 257
    eod = 256

    def encode(self, text: str | bytes) -> Ids:
        """Return the bytes of the text as ids, uint16 [bytes]."""
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint16)

    def cut(self, text: bytes) -> int:
        """Return the end: each byte is a token."""
        return len(text)

    def decode_bytes(self, ids: Iterable[int] | Ids) -> bytes:
        """Return the bytes themselves, without ends of documents."""
        array = self._checked(ids)
        return array[array != self.eod].astype(np.uint8).tobytes()

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return 1 for each byte and 0 for the end of a document, [257]."""
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[self.eod] = 0
        return lengths

    @property
    def fingerprint(self) -> str:
        """A constant: there is one byte tokenizer."""
        return "bytes-257"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that names this tokenizer."""
        write_atomically(path, json.dumps({"tokenizer": self.name}).encode() + b"\n")


# What SentencePiece cannot carry: it writes a space as U+2581, so a U+2581 of the text would come back as a space, and bytes
# that are no valid UTF-8 (here as surrogate escapes) have no character at all. Both are spelled with byte pieces.
_MARK = "\u2581".encode()
_SPELLED = re.compile("(\u2581+|[\udc80-\udcff]+)")
_BEFORE_SPACE = re.compile(rb"[!-~] ")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# A serialised normalizer_spec with add_dummy_prefix=false: what follows a serialised message replaces its fields.
_NO_PREFIX = b"\x1a\x02\x18\x00"
# Text that a model with lossy settings, or a file cut at a lucky place, does not bring back.
PROBE = "  Two  spaces\n\n\ttab ﬁ ① é \U0001f9ff \u4e2d "


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model with byte fallback and no normalisation, so that nothing of a text is lost.

    A model may put a space before each text (`prefix`: Llama's and Mixtral's do), which then comes back with it and counts as a byte.
    Raises UserError when the file is missing, damaged, or holds a model that changes text otherwise.
    """

    name = "sentencepiece"
    suffix = ".model"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer file {os.fspath(path)}: {error.strerror}") from None
        self._load(model, os.fspath(path))

    @classmethod
    def from_bytes(cls, model: bytes, source: str = "(memory)") -> "SentencePieceTokenizer":
        """Make a tokenizer of the content of a model file; `source` names it in errors."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(model, source)
        return tokenizer

    def _load(self, model: bytes, source: str) -> None:
        if not model:
            raise UserError(f"tokenizer file {source} is empty")
        try:
            self.content = model
            self._processor = spm.SentencePieceProcessor(model_proto=model)
            self.prefix = self._processor.id_to_piece(self._processor.encode("a")[0]).startswith("\u2581")
            if self.prefix:  # the parts of a text are encoded one by one, and only the first one gets it
                self._processor = spm.SentencePieceProcessor(model_proto=model + _NO_PREFIX)
            self.vocab_size = self._processor.get_piece_size()
            self._pieces = [self._piece_bytes(i) for i in range(self.vocab_size)]
        except (RuntimeError, OSError, ValueError, IndexError, UnicodeError) as error:
            raise UserError(f"tokenizer file {source} is no SentencePiece model, or is damaged ({error})") from None
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise UserError(f"tokenizer file {source} has no end-of-sentence piece to end documents; train with eos_id >= 0")
        self._byte_ids = self._find_byte_ids(source)
        if self.decode(self.encode(PROBE)) != " " * self.prefix + PROBE or len(self.encode("")):
            raise UserError(
                f"tokenizer file {source} changes text, or is damaged; train it with normalization_rule_name=identity, "
                "remove_extra_whitespaces=false"
            )

    def _piece_bytes(self, i: int) -> bytes:
        p = self._processor
        if p.is_byte(i):
            match = _BYTE_PIECE.fullmatch(p.id_to_piece(i))
            if match is None:
                raise ValueError(f"piece {i} is marked as a byte but named {p.id_to_piece(i)!r}")
            return bytes([int(match[1], 16)])
        if p.is_control(i) or p.is_unknown(i) or p.is_unused(i):
            return b""
        return str(p.id_to_piece(i)).replace("\u2581", " ").encode("utf-8")

    def _find_byte_ids(self, source: str) -> npt.NDArray[np.int32]:
        ids = {piece: i for i, piece in enumerate(self._pieces) if self._processor.is_byte(i)}
        if len(ids) != 256:
            raise UserError(f"tokenizer file {source} has {len(ids)} of 256 byte pieces; train it with byte_fallback=true")
        return np.array([ids[bytes([b])] for b in range(256)], dtype=np.int32)

    def pieces(self) -> tuple[list[str], dict[str, float], int]:
        """Every piece in the order of ids, as SentencePiece spells it; scores of those that merges make; the unknown one's id."""
        p = self._processor
        special = (p.is_byte, p.is_control, p.is_unknown, p.is_unused)
        names = [str(p.id_to_piece(i)) for i in range(self.vocab_size)]
        scores = {name: p.get_score(i) for i, name in enumerate(names) if not any(test(i) for test in special)}
        return names, scores, int(p.unk_id())

    def encode(self, text: str | bytes) -> Ids:
        """Return the ids of a text, int32 [tokens]."""
        raw = utf8(text)
        if self.prefix and raw:
            raw = b" " + raw
        if raw.isascii():
            return self._encode_plain(raw)
        try:
            text, plain = raw.decode("utf-8"), _MARK not in raw
        except UnicodeDecodeError:
            text, plain = raw.decode("utf-8", errors="surrogateescape"), False
        if plain:
            return self._encode_plain(raw)
        return np.concatenate(
            [self._spell(part) if i % 2 else self._encode_plain(part.encode()) for i, part in enumerate(_SPELLED.split(text))]
        )

    def cut(self, text: bytes) -> int:
        """Return the last place before a space that no piece has inside of it, so that nothing is merged across it."""
        at = 0 if self.prefix or not self._ends else len(text)
        while (at := text.rfind(b" ", 0, at)) > 0:
            if text[at - 1] in self._ends:
                return at
        return 0

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Visible ASCII characters after which no piece goes on with a space.

        None for models whose scores are no ranks of merges (unigram models): they add scores up from the start of a text, and the
        rounding of these sums could decide otherwise in a part of it.
        """
        if any(score != int(score) for score in self.pieces()[1].values()):
            return frozenset()
        names = [self._processor.id_to_piece(i).replace("\u2581", " ").encode() for i in range(self.vocab_size)]
        return frozenset(range(33, 127)) - {pair[0] for name in names for pair in _BEFORE_SPACE.findall(name)}

    def _spell(self, part: str) -> npt.NDArray[np.int32]:
        return self._byte_ids[np.frombuffer(part.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)]

    def _encode_plain(self, raw: bytes) -> npt.NDArray[np.int32]:
        """Encode valid UTF-8 in blocks that end at a cut: merging takes longer for a byte of a long text than of a short one."""
        encode = self._processor.encode
        if len(raw) <= MERGED_AT_ONCE:
            return encode(raw, return_type="numpy")
        found, start = [], 0
        while len(raw) - start > MERGED_AT_ONCE and (stop := self._next_cut(raw, start + MERGED_AT_ONCE)) is not None:
            found.append(encode(raw[start:stop], return_type="numpy"))  # arrays make no Python integer for each token
            start = stop
        found.append(encode(raw[start:], return_type="numpy"))
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _next_cut(self, raw: bytes, at: int) -> int | None:
        """Return the first place from `at` on before a space that no piece has inside of it."""
        at = raw.find(b" ", at) if self._ends else -1
        while at >= 0 and raw[at - 1] not in self._ends:
            at = raw.find(b" ", at + 1)
        return at if at >= 0 else None


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer named `bytes`, or the one in a file: a SentencePiece model, a tokenizer.json, or what `save` wrote.

    Raises UserError when the file is missing, damaged or unknown.
    """
    if source == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(source)
    try:
        if not path.is_file():
            raise UserError(f"tokenizer {path}: neither 'bytes' nor a file that exists (make corpus makes the quickstart's)")
        with path.open("rb") as file:
            start = file.read(64)
        if start.lstrip().startswith(b"{"):
            return _from_json(path.read_bytes(), os.fspath(path))
    except OSError as error:
        raise UserError(f"tokenizer file {path}: {error.strerror}") from None
    return SentencePieceTokenizer(path)


def _from_json(content: bytes, source: str) -> Tokenizer:
    # Imported here because they build on this module.
    from moe_train.data.characters import CharacterTokenizer
    from moe_train.data.pretrained import PretrainedTokenizer
    from moe_train.data.words import WordTokenizer

    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer file {source} is damaged JSON ({error})") from None
    name = fields.get("tokenizer")
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == CharacterTokenizer.name:
        return CharacterTokenizer.from_json(fields.get("symbols"), source)
    if name == WordTokenizer.name:
        return WordTokenizer.from_json(fields.get("words"), source)
    if "model" in fields:
        return PretrainedTokenizer(content, source)
    raise UserError(f"tokenizer file {source} is JSON but names no known tokenizer (known: bytes, characters, words)")


def train_sentencepiece(
    texts: Iterable[str | bytes], output: str | os.PathLike[str] | None, vocab_size: int, seed: int = 0
) -> SentencePieceTokenizer:
    """Train a lossless byte-pair model on texts, write it to `output` if given, and return it; equal input gives an equal model.

    Beyond MAX_TRAINING_CHUNKS pieces of CHUNK_CHARACTERS (400 MB of text) a sample drawn with `seed` is used. Raises UserError
    when the texts cannot fill `vocab_size` pieces, or need more.
    """
    model = io.BytesIO()
    spm.set_random_generator_seed(seed)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            input_sentence_size=MAX_TRAINING_CHUNKS,
            shuffle_input_sentence=True,
            max_sentence_length=4 * CHUNK_CHARACTERS,
            num_threads=1,  # the number is stored in the model, and so would change its hash
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if "sentences_.empty()" in str(error):
            raise UserError("SentencePiece has no text to train on") from None
        reason = re.sub(r".*\]\s*", "", str(error).strip(), flags=re.DOTALL)
        raise UserError(f"SentencePiece cannot train {vocab_size} pieces on this text: {reason or error}") from None
    tokenizer = SentencePieceTokenizer.from_bytes(model.getvalue())
    if output is not None:
        tokenizer.save(output)
    return tokenizer


def _chunks(texts: Iterable[str | bytes]) -> Iterator[str]:
    for text in texts:
        rest = utf8(text).decode("utf-8", errors="replace")
        start = 0
        while start < len(rest):
            end = rest.rfind("\n", start, start + CHUNK_CHARACTERS) + 1 or start + CHUNK_CHARACTERS
            yield rest[start:end]
            start = end
