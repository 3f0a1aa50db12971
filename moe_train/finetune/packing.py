"""Examples in rows of one length, and the batches that are made of them.

Examples are packed into rows once, in an order that the seed decides: each into the row with the least room that it fits (best fit).
An epoch is the rows in an order of its own, so that the place in the data is one number, as for pretraining (data/loader.py); the last
step of the last epoch is filled up. A row that packs several examples holds each as a document of its own: positions, attention and
segments start again. What is left of a row, or of the last step, is filled with the beginnings of other examples, as documents
without targets: routers' losses and statistics count every token, and then they count text and no padding.

Shapes: B rows of a micro-batch, S positions, R rows of an epoch.
"""

from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain
from typing import Any

import numpy as np
import torch

from moe_train.data.indexed import Int64s
from moe_train.data.loader import MicroBatch, StepBatch, check_batch
from moe_train.data.mixture import MAX_SAMPLES
from moe_train.data.order import Order
from moe_train.data.stream import NO_TARGET
from moe_train.errors import UserError
from moe_train.finetune.examples import Examples

STATE_VERSION = 1


def pack(lengths: Sequence[int], order: Iterable[int], size: int) -> list[list[int]]:
    """Numbers of the examples in each row of `size` tokens, taken in `order`, each into the fullest row that has room for it.

    Of equally full rows into the first one. Takes a time that grows with examples and their logarithm: `with_room[n]` is a heap of
    the rows with room for n tokens, and bit n of `rooms` says whether there is one, so that the least room is one look away.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0
    for number in order:
        length = lengths[number]
        if enough := rooms >> length << length:
            room = (enough & -enough).bit_length() - 1
            row = heappop(with_room[room])
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(number)
        if left := room - length:
            heappush(with_room[left], row)
            rooms |= 1 << left
    return rows


class PackedRows:
    """Rows of examples, for one data-parallel rank: all of them once and in order, an iterable of MicroBatch.

    Every rank gets the same number of micro-batches. `order` and `pack` say which examples come first and whether they share rows;
    `max_rows` stops earlier.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        seq_len: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        packed: bool = True,
        order: Sequence[int] | None = None,
        max_rows: int | None = None,
    ) -> None:
        self._examples, self._seq_len, self._micro_batch_size = examples, seq_len, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        order = range(len(examples)) if order is None else order
        self._rows = pack(examples.lengths.tolist(), order, seq_len) if packed else [[number] for number in order]
        members = np.fromiter(chain.from_iterable(self._rows), np.int64)
        starts = np.cumsum([0, *map(len, self._rows)])[:-1]
        self.targets = np.add.reduceat(examples.target_counts[members], starts)  # of each row, [R]
        self.num_rows = min(len(self._rows), max_rows or len(self._rows))

    @property
    def filled(self) -> float:
        """The share of the rows' tokens that are examples' own."""
        return float(self._examples.lengths.sum()) / (len(self._rows) * self._seq_len)

    def __len__(self) -> int:
        """Return the number of micro-batches of each rank."""
        return -(-self.num_rows // (self._micro_batch_size * self._dp_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield micro-batches dp_rank, dp_rank + dp_size, ..."""
        together = self._micro_batch_size * self._dp_size
        mine = np.arange(self._micro_batch_size, dtype=np.int64) + self._dp_rank * self._micro_batch_size
        for i in range(len(self)):
            numbers = i * together + mine
            yield self.batch(numbers, np.where(numbers < self.num_rows, numbers, -1))

    def batch(self, numbers: Int64s, rows: Int64s) -> MicroBatch:
        """The rows [B], -1 for one without examples of its own, as the run's rows `numbers` [B]."""
        out = np.zeros((5, len(rows), self._seq_len), dtype=np.int64)
        for i, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            self._fill(self._rows[row] if row >= 0 else [], number, out[:, i])
        tokens, targets, positions, doc_ids, labels = torch.from_numpy(out)
        return MicroBatch(tokens, targets, positions, doc_ids, labels, torch.from_numpy(numbers.copy()))

    def _fill(self, members: list[int], number: int, out: Int64s) -> None:
        """Write a row to out [5, S]: its examples, then the beginnings of others from the `number`-th on."""
        tokens, targets, positions, doc_ids, _ = out
        examples, at, document = self._examples, 0, 0
        while at < self._seq_len:
            own = document < len(members)
            example = members[document] if own else (number + document) % len(examples)
            start = int(examples.starts[example])
            size = min(int(examples.lengths[example]), self._seq_len - at)
            place, source = slice(at, at + size), slice(start, start + size)
            tokens[place] = examples.tokens[source]
            targets[place] = examples.targets[source] if own else NO_TARGET
            positions[place] = np.arange(size)
            doc_ids[place] = document
            at, document = at + size, document + 1


class PackedLoader:
    """Training batches of packed examples: `epochs` times all of them, or for ever.

    Raises UserError where the batch sizes do not divide.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        seq_len: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        packed: bool = True,
        epochs: int | None = None,
    ) -> None:
        check_batch(global_batch_size, micro_batch_size, dp_size)
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._dp_rank, self._dp_size, self._seq_len, self._seed = dp_rank, dp_size, seq_len, seed
        order = Order(len(examples), seed, "examples")(np.arange(len(examples)))
        self.rows = PackedRows(
            examples,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            packed=packed,
            order=order.tolist(),
        )
        self._data = {"examples": examples.fingerprint, "packed": packed}
        self._end = None if epochs is None else epochs * self.rows.num_rows
        self._cursor = 0  # rows taken since the start of the run, by all ranks

    @property
    def steps(self) -> int | None:
        """Optimizer steps of all epochs; None where there is no end."""
        return None if self._end is None else -(-self._end // self._global_batch_size)

    def next_step(self) -> StepBatch:
        """Return this rank's micro-batches of the next step, and move on. Beyond the last epoch rows have no targets."""
        numbers = np.arange(self._cursor, self._cursor + self._global_batch_size)
        rows = self._rows_at(numbers)
        if (rows < 0).all():
            raise UserError(f"train.steps: all {self._end} rows of sft.epochs have been trained on; raise sft.epochs")
        size = self._micro_batch_size
        mine = [slice(j, j + size) for j in range(self._dp_rank * size, len(rows), self._dp_size * size)]
        targets = int(self.rows.targets[rows[rows >= 0]].sum())
        self._cursor += self._global_batch_size
        return StepBatch([self.rows.batch(numbers[part], rows[part]) for part in mine], len(rows) * self._seq_len, targets)

    def _rows_at(self, numbers: Int64s) -> Int64s:
        """Which row each of the run's rows is; -1 behind the last epoch."""
        count = self.rows.num_rows
        rows = np.full_like(numbers, -1)
        for epoch in np.unique(numbers // count).tolist():
            here = numbers // count == epoch
            rows[here] = Order(count, self._seed, "rows", epoch)(numbers[here] % count)
        return rows if self._end is None else np.where(numbers < self._end, rows, -1)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, and what it is a place of, as JSON types. The same on every rank."""
        place = {"samples": self._cursor, "seed": self._seed, "seq_len": self._seq_len}
        batch = {} if self._end is None else {"global_batch_size": self._global_batch_size}  # epochs are so many steps of it
        return {"version": STATE_VERSION, "kind": "sft", **place, **self._data, **batch}

    def load_state_dict(self, state: Any) -> None:
        """Go to a place that `state_dict` returned; ranks and batch sizes may have changed since, and files may have moved.

        Raises UserError, naming what differs, when it is not a place in these rows.
        """
        mine = self.state_dict()
        if not isinstance(state, dict) or any(state.get(key) != mine[key] for key in ("version", "kind")):
            raise UserError("the run was not saved by fine-tuning of this version; choose another run.dir")
        names = {"seed": "run.seed", "seq_len": "train.seq_len", "packed": "sft.pack", "examples": "the content of sft.train"}
        names |= {"global_batch_size": "with sft.epochs, train.global_batch_size"}
        for key, name in names.items():
            if key in mine and state.get(key) != mine[key]:
                rule = f"was {state.get(key)} when the run was saved; the place in the data would be lost"
                raise UserError(f"{name}={mine[key]}: {rule}; set it back, or choose another run.dir")
        samples = state.get("samples")
        if type(samples) is not int or not 0 <= samples <= MAX_SAMPLES:
            raise UserError(f"loader state {state!r} is no place in the data; start from another checkpoint")
        self._cursor = samples
