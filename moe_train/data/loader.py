"""Rows of a token stream for training, in a random order that depends on nothing but the seed, and for evaluation.

Row r of an epoch is the tokens at [r S, (r + 1) S) of all documents behind each other; fewer than S tokens at the end of the
stream are in no row. Sample i of a run is row `Order(rows, seed, epoch)(i % rows)` of epoch i // rows, so the position in the
data is one number, whatever the ranks, workers and batch sizes are. With weights each prefix has its own rows, order and position
(mixture.py); contiguous rows continue each other from batch to batch. Micro-batch j of a step takes samples
[cursor + j B, cursor + (j + 1) B) and goes to data-parallel rank j % dp_size.

Shapes: B rows of a micro-batch, S positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_train.data.indexed import Int64s
from moe_train.data.mixture import MAX_SAMPLES, Mixture, Source, check_weights
from moe_train.data.order import Lanes
from moe_train.data.stream import NO_TARGET, Prefixes, TokenStream
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError

STATE_VERSION, BLEND_VERSION = 1, 2  # of the state of one source, and of several with weights


@dataclass(frozen=True)
class MicroBatch:
    """Whole rows, all int64 [B, S] but rows. A row holds several documents, which must not see each other."""

    tokens: Tensor
    targets: Tensor  # the next token of the same document; -100 where there is none
    positions: Tensor  # from 0 at the start of each document and of the row
    doc_ids: Tensor  # from 0 in each row
    labels: Tensor  # of the token's document: an index into label_names, 0 where unknown
    rows: Tensor  # [B] global row numbers, counted on over the epochs, so that none comes twice in a run


@dataclass(frozen=True)
class StepBatch:
    """What one data-parallel rank works on in one optimizer step; the counts are those of all ranks together."""

    microbatches: list[MicroBatch]
    token_count: int
    target_count: int
    continues: bool = False  # each row goes on where the same row of the step before has ended


class Loader:
    """Training batches, for ever. Opening takes the same time for any size of the data, and so does going to any place in it.

    `weights`, one for each prefix, blend the prefixes; without them they are one corpus. `contiguous` cuts the corpus into as many
    streams as a global batch has rows, which rows of a batch go through side by side.

    Raises UserError when the data cannot be read, has fewer tokens than one row, or the batch sizes do not divide.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        *,
        seq_len: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        vocab_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        weights: Sequence[float] | None = None,
        contiguous: bool = False,
    ) -> None:
        _check_sizes(seq_len, micro_batch_size, dp_rank, dp_size)
        check_batch(global_batch_size, micro_batch_size, dp_size)
        self._stream = TokenStream(prefixes, vocab_size, tokenizer, "data.train")
        self._seq_len, self._micro_batch_size, self._global_batch_size = seq_len, micro_batch_size, global_batch_size
        self._seed, self._dp_rank, self._dp_size = seed, dp_rank, dp_size
        self._cursor = 0  # samples taken since the start of the run, by all ranks
        self._blended, self._lanes = weights is not None, global_batch_size if contiguous else None
        if contiguous and weights is not None:
            raise UserError("data.order=contiguous: rows of a blend cannot continue each other; leave out data.weights")
        self._mixture = Mixture(self._sources(weights), seq_len, seed, self._lanes)
        self.rows_per_epoch = sum(source.rows for source in self._mixture.sources)

    def _sources(self, weights: Sequence[float] | None) -> list[Source]:
        stream = self._stream
        spans = [(0, len(stream.datasets))] if weights is None else stream.sources
        check_weights(weights := [1.0] if weights is None else weights, len(spans))
        sources: list[Source] = []
        for (first, last), weight in zip(spans, weights, strict=True):
            start, stop = stream.span(first, last)
            rows = (stop - start) // self._seq_len // (self._lanes or 1) * (self._lanes or 1)
            if rows == 0:
                needed = (
                    f"{self._lanes} rows of {self._seq_len}, one per stream" if self._lanes else f"one row of {self._seq_len}"
                )
                raise UserError(
                    f"the data ({self._names(first, last)}) has {stop - start} tokens, fewer than {needed}; "
                    "add data or lower train.seq_len"
                )
            data = [
                {"prefix": str(d.prefix), "tokens": d.num_tokens, "fingerprint": d.fingerprint}
                for d in stream.datasets[first:last]
            ]
            sources.append(Source(start, rows, data, float(weight), number=len(sources)))
        if len({source.identity for source in sources}) < len(sources):
            raise UserError(
                "data.train names the same data twice, and data.weights blends it; name it once, with a larger weight"
            )
        return sources

    def _names(self, first: int, last: int) -> str:
        names = [str(d.prefix) for d in self._stream.datasets[first:last]]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of labels 0, 1, ... in the batches, over all datasets."""
        return self._stream.label_names

    @property
    def epochs(self) -> float:
        """How many times the data has been gone through; of a blend, the source that comes round most often."""
        return max(source.cursor / source.rows for source in self._mixture.sources)

    def next_step(self) -> StepBatch:
        """Return this rank's micro-batches of the next step, and move on. Raises UserError for damaged data."""
        size = self._micro_batch_size
        continues = self._lanes is not None and self._cursor % self.rows_per_epoch > 0
        rows, starts = self._mixture.take(self._global_batch_size)
        mine = [slice(j, j + size) for j in range(self._dp_rank * size, len(rows), self._dp_size * size)]
        microbatches = [_make_batch(self._stream, rows[part].copy(), starts[part], self._seq_len) for part in mine]
        targets = sum(self._stream.count_targets(start, start + self._seq_len) for start in starts.tolist())
        self._cursor += self._global_batch_size
        return StepBatch(microbatches, self._global_batch_size * self._seq_len, targets, continues)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, and what it is a place of, as JSON types. The same on every rank."""
        common = {"samples": self._cursor, "seed": self._seed, "seq_len": self._seq_len}
        if self._blended:
            return {"version": BLEND_VERSION, **common, "sources": self._mixture.state()}
        lanes = {} if self._lanes is None else {"streams": self._lanes}
        return {"version": STATE_VERSION, **common, **lanes, "data": self._mixture.sources[0].data}

    def load_state_dict(self, state: Any) -> None:
        """Go to a place that `state_dict` returned; ranks and batch sizes may have changed since, and data may have moved.

        Raises UserError, naming what differs, when it is not a place in this data, row length and order.
        """
        version = state.get("version") if isinstance(state, dict) else None
        if version not in (STATE_VERSION, BLEND_VERSION):
            raise UserError(
                f"loader state has version {version!r}; this code reads {STATE_VERSION} and {BLEND_VERSION}; use another one"
            )
        if version == BLEND_VERSION and not self._blended:
            raise UserError("the run was saved with a blend of sources; give data.weights, or start a new run")
        mine = self.state_dict()
        blended = _as_blend(state) if self._blended else state
        if not _is_place(blended, mine):
            raise UserError(f"loader state {state!r} is no place in the data; start from another checkpoint")
        for key, name in (
            ("seq_len", "train.seq_len"),
            ("seed", "run.seed"),
            ("streams", "train.global_batch_size"),  # as many contiguous streams as a batch has rows
        ):
            now, then = mine.get(key), blended.get(key)
            if key == "streams" and (now is None) != (then is None):
                name, now, then = "data.order", *("contiguous" if found else "shuffled" for found in (now, then))
            if now != then:
                raise UserError(
                    f"{name}={now}: was {then} when the run was saved; the place in the data would be lost: set it back, or "
                    "start a new run"
                )
        if self._blended:
            self._mixture.load(blended["sources"])
        else:
            self._check_same_data(blended["data"], mine["data"])
            self._mixture.sources[0].cursor = int(blended["samples"])
        self._cursor = int(blended["samples"])

    def _check_same_data(self, saved: list[dict[str, Any]], mine: list[dict[str, Any]]) -> None:
        remedy = "give the same data in the same order, or start a new run"
        if len(saved) != len(mine):
            raise UserError(f"the run was saved with {len(saved)} datasets, now there are {len(mine)}; {remedy}")
        for old, new in zip(saved, mine, strict=True):
            if old["fingerprint"] != new["fingerprint"]:
                raise UserError(
                    f"dataset {new['prefix']} ({new['tokens']} tokens) is not the one that the run was saved with, "
                    f"{old['prefix']} ({old['tokens']} tokens); {remedy}"
                )


class EvalRows:
    """All rows of some datasets once and in order, for one data-parallel rank: an iterable of MicroBatch.

    Every rank gets the same number of micro-batches, all [B, S], so that ranks can compute together: the last row and the last
    micro-batches are filled with padding, which is a document of its own without targets. `max_rows` stops earlier. With
    `streams`, a multiple of all ranks' rows of a micro-batch, the rows are cut into so many contiguous streams side by side, dealt as
    the Loader deals them: rows of micro-batch i continue those of micro-batch i - n, n of them being a row of every stream. With a
    `stride` each row starts so many tokens after the one before, and all but the first have targets in their last `stride` places
    alone: every token is predicted once, from the `seq_len - stride` tokens before it at least. Errors name the `key` of the prefixes.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        *,
        seq_len: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_rows: int | None = None,
        vocab_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        streams: int | None = None,
        stride: int | None = None,
        key: str | None = None,
    ) -> None:
        _check_sizes(seq_len, micro_batch_size, dp_rank, dp_size)
        self._stream = TokenStream(prefixes, vocab_size, tokenizer, key)
        if self._stream.num_tokens < 2:
            raise UserError(f"dataset {self._stream.datasets[0].prefix} has fewer than 2 tokens; there is nothing to predict")
        if max_rows is not None and max_rows < 1:
            raise UserError(f"max_rows {max_rows} must be at least 1")
        self._seq_len, self._micro_batch_size = seq_len, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._streams = streams
        self._stride = stride or seq_len
        beyond_first = max(self._stream.num_tokens - seq_len, 0)
        self.num_rows = min(1 + -(-beyond_first // self._stride), max_rows or self._stream.num_tokens)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of labels 0, 1, ... in the batches, over all datasets."""
        return self._stream.label_names

    def __len__(self) -> int:
        """Return the number of micro-batches of each rank."""
        together = self._micro_batch_size * self._dp_size
        side_by_side = self._streams or together
        return -(-self.num_rows // side_by_side) * side_by_side // together

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield micro-batches dp_rank, dp_rank + dp_size, ..."""
        together = self._dp_size * self._micro_batch_size
        mine = np.arange(self._micro_batch_size, dtype=np.int64) + self._dp_rank * self._micro_batch_size
        for i in range(len(self)):
            rows = i * together + mine
            if self._streams is not None:
                rows = Lanes(len(self) * together, self._streams)(rows)
            starts = np.where(rows < self.num_rows, rows * self._stride, self._stream.num_tokens)
            micro = _make_batch(self._stream, rows, starts, self._seq_len)
            micro.targets[torch.from_numpy(rows > 0), : self._seq_len - self._stride] = NO_TARGET  # rows before predict these
            yield micro


def _as_blend(state: dict[str, Any]) -> dict[str, Any]:
    """A state of one source as one of a blend that had this source alone."""
    if state["version"] == BLEND_VERSION:
        return state
    only = {"data": state.get("data"), "weight": 1.0, "cursor": state.get("samples"), "taken": 0, "number": 0}
    return state | {"sources": [only]}


def _is_place(state: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether a saved state has the entries of `mine` and numbers that a run can reach."""
    samples, data = state.get("samples"), state.get("data")
    if mine.keys() - {"streams"} - state.keys() or type(samples) is not int or not 0 <= samples <= MAX_SAMPLES:
        return False
    if "data" not in mine:
        return True  # the mixture checks its sources
    if not isinstance(data, list):
        return False
    return all(isinstance(entry, dict) and not mine["data"][0].keys() - entry.keys() for entry in data)


def check_batch(global_batch_size: int, micro_batch_size: int, ranks: int) -> None:
    """Raise UserError where a global batch is not as many micro-batches on each of the data-parallel ranks."""
    if global_batch_size < 1 or global_batch_size % (micro_batch_size * ranks):
        raise UserError(
            f"train.global_batch_size={global_batch_size}: must be a multiple of train.micro_batch_size={micro_batch_size} "
            f"times {ranks} data-parallel ranks; change one of them"
        )


def _check_sizes(seq_len: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
    if seq_len < 2:
        raise UserError(f"train.seq_len {seq_len} must be at least 2, a token and the one to predict from it")
    if micro_batch_size < 1:
        raise UserError(f"train.micro_batch_size {micro_batch_size} must be at least 1")
    if not 0 <= dp_rank < dp_size:
        raise UserError(f"data-parallel rank {dp_rank} must be in 0 to {dp_size - 1}")


def _make_batch(stream: TokenStream, rows: Int64s, starts: Int64s, seq_len: int) -> MicroBatch:
    """Read the rows (both int64 [B]) that start at these tokens of the stream; beyond its end they are padding."""
    out = np.empty((5, len(rows), seq_len), dtype=np.int64)
    for i, start in enumerate(starts.tolist()):
        stream.fill_row(start, out[:, i])
    tokens, targets, positions, doc_ids, labels = torch.from_numpy(out)
    return MicroBatch(tokens, targets, positions, doc_ids, labels, rows=torch.from_numpy(rows))


def count_bytes(targets: Tensor, byte_lengths: Tensor) -> Tensor:
    """Return the bytes of text that the targets stand for, int64 []; bits per byte = nats / ln 2 / this.

    Shapes: targets any, -100 where there is none; byte_lengths int64 [V], from `Tokenizer.byte_lengths`.
    """
    return byte_lengths[targets[targets != NO_TARGET]].sum()
