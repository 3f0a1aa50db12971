"""Which keys the queries at some positions of packed rows see, in the forms that attention kernels take.

Shapes: B rows, S positions, Q positions of queries.
"""

import torch
from torch import Tensor

from moe_train.model.attention import document_bounds
from moe_train.model.routing import Segments

BLOCK = 128  # queries and keys of a block of FlexAttention's masks


def mask_queries(doc_ids: Tensor, queries: Tensor) -> Segments:
    """Which keys of whole rows the queries at some positions see: doc_ids [B, S], queries [Q] -> mask [B, 1, Q, S]."""
    causal = queries[:, None] >= torch.arange(doc_ids.shape[1], device=doc_ids.device)
    same = doc_ids[:, queries, None] == doc_ids[:, None, :]
    return Segments(mask=(same & causal)[:, None])


def find_runs(doc_ids: Tensor, queries: Tensor, device: torch.device) -> Segments:
    """The runs of consecutive queries that are in one document, and the keys of each: from the document's first to the run's last.

    doc_ids [B, S] and queries [Q], ascending inside of a run, on the CPU. Keys that two runs of a document see are there twice: under
    a zigzag split of S positions over n ranks they are S (2 n + 1) / (2 n) at most.
    """
    rows, length = doc_ids.shape
    jumps = (queries.diff() != 1).long().cumsum(0)
    pieces = torch.cat([jumps.new_zeros(1), jumps])  # the piece of the row that a query is in
    documents = document_bounds(doc_ids)[:-1].long()  # their first keys in the flattened rows
    at = (torch.arange(rows)[:, None] * length + queries).flatten()  # each query's own key
    owner = torch.searchsorted(documents, at, right=True) - 1
    run = owner * (int(pieces[-1]) + 1) + pieces.repeat(rows)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (run.diff() != 0).nonzero().flatten() + 1])
    ends = torch.cat([starts[1:], torch.tensor([len(at)])])
    first, last = documents[owner[starts]], at[ends - 1]
    counts = last - first + 1
    key_bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    keys = torch.arange(int(key_bounds[-1])) + (first - key_bounds[:-1]).repeat_interleave(counts)
    bounds = torch.cat([starts, ends[-1:]])
    return Segments(
        bounds=bounds.int().to(device, non_blocking=True),
        keys=keys.to(device, non_blocking=True),
        key_bounds=key_bounds.int().to(device, non_blocking=True),
    )


def find_blocks(doc_ids: Tensor, queries: Tensor) -> Segments:
    """The same as FlexAttention takes it: doc_ids [B, S] and queries [Q] on its device.

    The ends of a block of queries and of one of keys say how they meet, so that no mask of Q x S is made, as torch's create_block_mask
    would. A block that is not full may still be empty, where the queries of one block are of two pieces of a row.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = doc_ids.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, at = row % rows, queries[query]  # modulo: `Segments.twice`
        return (at >= key) & (doc_ids[own, at] == doc_ids[own, key])

    columns = torch.arange(length, device=queries.device)
    first, last = _ends(queries[None])[..., None]
    low, high = _ends(doc_ids[:, queries])[..., None]
    key_first, key_last = _ends(columns[None])[:, :, None]
    key_low, key_high = _ends(doc_ids)[:, :, None]
    reached = (last >= key_first) & (high >= key_low) & (low <= key_high)
    full = (first >= key_last) & (low == key_high) & (high == key_low) & _whole(queries)[:, None] & _whole(columns)
    listed = *_listed(reached & ~full), *_listed(full)
    return Segments(blocks=BlockMask.from_kv_blocks(*listed, BLOCK, sees, (len(queries), length)))


def _ends(x: Tensor) -> Tensor:
    """The least and the largest of each block of x [B, n]: [2, B, blocks]."""
    at = torch.arange(-(-x.shape[1] // BLOCK) * BLOCK, device=x.device).clamp_max(x.shape[1] - 1)  # a short block's last again
    return torch.stack(x[:, at].unflatten(1, (-1, BLOCK)).aminmax(dim=-1))


def _whole(x: Tensor) -> Tensor:
    """Which blocks of x [n] are not short: [blocks] bool."""
    return torch.arange(BLOCK, len(x) + BLOCK, BLOCK, device=x.device) <= len(x)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of keys that each block of queries sees, [B, query blocks, key blocks] bool, as their numbers and their indices."""
    dense = blocks[:, None].int()  # for all heads
    return dense.sum(-1, dtype=torch.int32), torch.sort(dense, dim=-1, descending=True, stable=True).indices.int()
