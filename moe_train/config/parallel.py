"""The parallel section: the layout."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from moe_train.config.base import AutoInt, Conflict, Section


class ParallelSection(Section):
    """The layout: how many ranks along each axis. Ranks are numbered with tp fastest, then cp, dp_shard, dp_replicate, pp."""

    dp_replicate: PositiveInt = 1
    """copies of the sharded state (HSDP)"""
    dp_shard: AutoInt = "auto"
    """ranks that share one copy of parameters, gradients and optimizer state; auto = what is left of the world"""
    sharding: Literal["none", "optimizer", "gradients", "parameters"] = "gradients"
    """what data-parallel ranks share out: `parameters` gathers them in forward and in backward, `gradients` reduces gradients after
    each micro-batch (with pp after the last), `optimizer` only after the last; `none` keeps a whole copy on each rank"""
    tp: PositiveInt = 1
    """tensor parallel ranks, over which rows are sharded too (sequence parallelism)"""
    pp: PositiveInt = 1
    """pipeline ranks"""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    """order of a pipeline's work; interleaved, zbv and dualpipev give each rank two stages"""
    pp_layers: list[PositiveInt] | None = None
    """layers of each stage, from the first; default: split so that the costliest stage is as cheap as can be"""
    cp: PositiveInt = 1
    """context parallel ranks, which share out the positions of a row"""
    cp_method: Literal["gather", "ulysses"] = "gather"
    """gather: each rank has some queries and all keys and values; ulysses: each rank has some heads"""
    ep: PositiveInt = 1
    """expert parallel ranks"""
    expert_tp: PositiveInt = 1
    """tensor parallel ranks inside an expert: 1 or tp"""
    timeout_seconds: PositiveInt = 600
    """a collective that takes longer ends the run with an error"""

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pp * (2 if self.pp > 1 and self.pp_schedule in ("interleaved", "zbv", "dualpipev") else 1)

    def conflicts(self) -> list[Conflict]:
        """Rules between the axes."""
        found = []
        if self.expert_tp not in (1, self.tp):
            rule = f"must be 1 or parallel.tp={self.tp}"
            found.append(Conflict("parallel.expert_tp", self.expert_tp, rule, "use one of the two"))
        if self.pp > 1 and self.sharding == "parameters":
            rule = "cannot be combined with pp: zero-bubble schedules would compute wrong gradients, others gather for each micro-batch"
            found.append(Conflict("parallel.sharding", self.sharding, rule, "use gradients or optimizer"))
        if self.pp_layers is not None and len(self.pp_layers) != self.stages:
            rule = f"must name the layers of {self.stages} stages (pp={self.pp}, {self.pp_schedule})"
            found.append(Conflict("parallel.pp_layers", self.pp_layers, rule, "give one number per stage"))
        return found
