"""Expert parallelism: each rank of `ep` owns E / ep experts, and rows travel to them and back.

A row is sent once to each rank that owns one of its experts, however many of them it owns, and comes back as one weighted sum: this
is `permute` and `unpermute` with ranks in the place of experts, with an all-to-all of uneven splits between. Nothing is dropped,
and a rank that gets no rows works on empty tensors. Under expert tensor parallelism each expert's width is split over `expert_tp`
ranks, which gather their rows before and scatter the sums after.

Bytes that a rank sends in a forward pass: n (D b + 8 K), for n rows of b-byte numbers that go to other ranks, each with K fp32
weights and K int32 ids; the results take n D b more, and backward the same again without the ids.

Shapes: n rows here, D hidden, K choices, E experts, R ranks of ep.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from moe_kernels import Backend
from moe_kernels.types import Plan
from moe_train.model.decoder import Decoder
from moe_train.model.moe import MoE
from moe_train.parallel.collectives import all_gather, all_to_all, reduce_scatter
from moe_train.parallel.tensor import split_parameter


def apply_expert(model: Decoder, mesh: DeviceMesh, kernels: Backend) -> None:
    """Give each rank of `mesh` (ep, expert_tp) its experts, in place."""
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        experts = module.experts
        for name, width in (("gate_up", 2), ("down", 2)):
            placements = (Shard(0), Shard(width))
            split_parameter(experts, name, experts.get_parameter(name), mesh, placements, placements)
        if mesh.device_type == "cuda":
            module.run_both = run_side_by_side
        module.dispatcher = ExpertParallel(experts.count, mesh.get_group("ep"), mesh.get_group("expert_tp"), kernels)


def run_side_by_side(routed: Callable[[], Tensor], shared: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The shared expert on a stream of its own, where it computes while the host waits for row counts and rows travel.

    Autograd runs its backward there, too.
    """
    main, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
    side.wait_stream(main)
    with torch.cuda.stream(side):
        beside = shared()
    out = routed()
    main.wait_stream(side)
    beside.record_stream(main)
    return out, beside


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Trip(NamedTuple):
    """Where the rows of one forward pass go."""

    plan: Plan  # the ranks that each row goes to, sorted by rank
    rows: int  # n, over all ranks of expert_tp
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    ids: Tensor  # [sum(received), K] int32, local ids of the rows that came; -1 where a choice belongs to another rank
    source: Tensor  # [sum(sent)] the row that each sent row is
    chosen: Tensor  # [sum(sent), K] bool, which choices the destination owns


class ExpertParallel:
    """`moe_train.model.moe.Dispatcher` over the ranks of `group`, with each expert's width split over `width_group`."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup, width_group: dist.ProcessGroup, kernels: Backend) -> None:
        self.group, self.width_group, self.kernels = group, width_group, kernels
        self.ranks, self.local = group.size(), num_experts // group.size()

    def plan(self, expert_ids: Tensor) -> Trip:
        """Exchange how many rows go where, and their ids. The counts come to the host: the sizes of what follows depend on them."""
        ids = all_gather(expert_ids, 0, self.width_group)
        owners = torch.where(ids >= 0, ids // self.local, -1)
        plan = self.kernels.sort_by_expert(_without_repeats(owners, self.ranks), self.ranks)
        counts, ones = plan.offsets.diff(), [1] * self.ranks
        sent, received = torch.stack([counts, all_to_all(counts, ones, ones, self.group)]).tolist()
        source = plan.row_slot[: sum(sent)].long() // plan.top_k
        ranks = torch.arange(self.ranks, dtype=ids.dtype, device=ids.device)
        destination = ranks.repeat_interleave(counts, output_size=sum(sent))[:, None]
        chosen = owners[source] == destination
        there = torch.where(chosen, ids[source] - destination * self.local, -1)
        return Trip(plan, len(ids), sent, received, all_to_all(there, sent, received, self.group), source, chosen)

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, plan: Trip) -> tuple[Tensor, Tensor, Tensor]:
        """rows [n, D], weights [n, K] -> what came here: rows [m, D], local ids [m, K], weights [m, K]."""
        rows, weights = all_gather(rows, 0, self.width_group), all_gather(weights, 0, self.width_group)
        send = self.kernels.permute(rows, plan.plan)[: sum(plan.sent)]
        scale = torch.where(plan.chosen, weights[plan.source], 0)
        there = all_to_all(send, plan.sent, plan.received, self.group)
        return there, plan.ids, all_to_all(scale, plan.sent, plan.received, self.group)

    def combine(self, rows: Tensor, plan: Trip) -> Tensor:
        """Results [m, D] of this rank's experts -> [n, D], summed over ranks in their order."""
        back = all_to_all(rows, plan.received, plan.sent, self.group)
        slots = back.new_zeros(plan.plan.row_slot.shape[0] - back.shape[0], back.shape[1])  # rows without a destination
        out = self.kernels.unpermute(torch.cat([back, slots]), plan.plan, None)
        return reduce_scatter(out, 0, self.width_group)


def _without_repeats(owners: Tensor, ranks: int) -> Tensor:
    """owners [n, K], -1 for none -> [n, min(K, ranks)] int32 with each owner once."""
    if ranks <= owners.shape[1]:
        columns = torch.arange(ranks, dtype=torch.int32, device=owners.device)
        return torch.where((owners[:, :, None] == columns).any(1), columns, -1)
    earlier = (owners[:, :, None] == owners[:, None, :]).tril(-1).any(-1)
    return torch.where(earlier, -1, owners).int()
