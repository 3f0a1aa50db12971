"""Ranks draw the initial values of the experts that they own and of no others, and no layout changes a value."""

from typing import Any

import torch
from layouts import tiny
from models import decoder_of
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train import verify
from moe_train.cli import parse
from moe_train.engine.model import Model
from moe_train.parallel.mesh import start_world

RUN = tiny({"name": "topk"}, {"model": {"num_experts": 8, "num_layers": 2}})
EXPERT = 3 * 8 * 16  # numbers of one expert
OWNED = {  # layout -> the experts of a layer of which each of four ranks has all or a part
    "ep=4": [2, 2, 2, 2],
    "dp_shard=4": [2, 2, 2, 2],
    "dp_shard=4,sharding=none": [8, 8, 8, 8],
    "dp_replicate=2,dp_shard=2": [4, 4, 4, 4],
    "dp_shard=4,ep=2": [2, 2, 2, 2],  # data parallelism shares out what expert parallelism has given a rank
    "tp=2,ep=2": [2, 2, 2, 2],
    "tp=2,ep=2,expert_tp=2": [4, 4, 4, 4],
    "pp=2,ep=2": [4, 4, 4, 4],
    "dp_shard=4,model.num_experts=6": [2, 2, 2, 0],
}


def materialise(layouts: list[str]) -> list[tuple[dict[str, Tensor], int, int]]:
    """Per layout the logical values of this rank's parameters, and the random numbers drawn for experts in how many layers."""
    found = []
    for layout in layouts:
        config = verify.lay_out(parse(RUN, "test"), layout).config
        model, drawn = Model(config, start_world(config)), Drawn()
        with drawn:
            model.materialise()
        values = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
        values = {name: value.detach().clone() for name, value in values.items()}
        rest = sum(value.numel() for name, value in values.items() if value.dim() > 1 and "experts" not in name)
        found.append((values, drawn.numbers - rest, sum(name.endswith("experts.down") for name in values)))
    return found


class Drawn:
    """Counts the normal random numbers that torch draws."""

    def __enter__(self) -> None:
        self.numbers, self.normal = 0, Tensor.normal_
        Tensor.normal_ = self._count

    def __exit__(self, *_: object) -> None:
        Tensor.normal_ = self.normal

    @property
    def _count(self) -> Any:
        def count(values: Tensor, *arguments: Any, **words: Any) -> Tensor:
            self.numbers += values.numel()
            return self.normal(values, *arguments, **words)

        return count


def test_a_rank_draws_its_own_experts() -> None:
    results = run_ranks(4, materialise, list(OWNED))
    for i, (layout, owned) in enumerate(OWNED.items()):
        config = verify.lay_out(parse(RUN, "test"), layout).config
        whole = dict(decoder_of(config.model, torch.float32, seed=config.run.seed).named_parameters())
        for rank, (values, numbers, layers) in enumerate(result[i] for result in results):
            assert numbers == layers * owned[rank] * EXPERT, (layout, rank)
            for name, value in values.items():
                assert torch.equal(value, whole[name]), (layout, name)
        assert {name for result in results for name in result[i][0]} == whole.keys()


def test_experts_differ() -> None:
    """Two experts that start alike would stay alike."""
    config = parse(RUN, "test")
    for name, value in decoder_of(config.model, torch.float32).named_parameters():
        if name.endswith(("experts.gate_up", "experts.down")):
            assert len({tuple(expert.flatten().tolist()) for expert in value}) == len(value) == 8
