"""What is done to the decoder on one rank, which the comparisons of layouts cannot see: they compare results alone."""

from typing import Any

import pytest
from models import TINY, TOPK
from torch.distributed.fsdp import FSDPModule

from moe_train.cli import parse
from moe_train.engine.model import Model
from moe_train.parallel.mesh import start_world


def model_of(**train: Any) -> Model:
    train = {"device": "cpu", "dtype": "fp32", **train}
    config = parse({"model": {**TINY, "router": TOPK}, "train": train}, "test")
    return Model(config, start_world(config))


@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_are_compiled_where_that_is_asked_for(compiled: bool) -> None:
    blocks = model_of(compile=compiled).parts[0].layers.values()
    assert [block._compiled_call_impl is not None for block in blocks] == [compiled] * TINY["num_layers"]


@pytest.mark.parametrize(("dtype", "sharded"), [("fp32", False), ("bf16", True)])
def test_one_rank_goes_without_fsdp_unless_it_casts(dtype: str, sharded: bool) -> None:
    assert isinstance(model_of(dtype=dtype).parts[0], FSDPModule) == sharded
