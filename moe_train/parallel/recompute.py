"""Activation recomputation: which parts of a block backward computes again instead of keeping their activations.

The router is never among them. Recomputed scores can differ in the last bit, and a near-tied token would then go through other
experts in backward than in forward; so a routing decision, its state and its graph are kept, and statistics are counted once.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint

from moe_train.model.decoder import Block, Decoder
from moe_train.model.transformer_xl import TransformerXLBlock

Recompute = Literal["none", "selective", "full"]


def apply_recompute(model: Decoder, mode: Recompute) -> None:
    """Let the blocks of `model` recompute: `selective` the experts and dense MLPs, `full` attention with its norms as well."""
    for block in model.layers.values():
        assert isinstance(block, Block | TransformerXLBlock)
        if mode != "none":
            block.run_mlp = _recomputed
        if mode == "full":
            block.run_attention = _recomputed


def _recomputed(part: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in a block draws from a generator
