"""A linear gate that stays at its random initial values (RandomMoE of the RMoE paper, arXiv 2408.06793, section 4).

    s = x C                          C: [D, E], drawn once, never trained; then top-k as in topk.py

What learning to route is worth is what a router gains over this one. The experts are trained, and the hidden rows learn to fit
the gate: the balance loss reaches them alone. Any other router is frozen, for fine-tuning say, by `model.router.frozen`.

State: none. Cost: as topk.py. Traps: a frozen gate must not be decayed either; it is no part of the optimizer.
"""

from typing import Literal

from moe_train.model.routing import register
from moe_train.routers.topk import TokenChoiceConfig, TopKRouter


class RandomConfig(TokenChoiceConfig):
    """Frozen linear gate."""

    name: Literal["random"] = "random"
    """a linear gate that is never trained"""
    frozen: Literal[True] = True
    """it is what this router is"""


@register(RandomConfig)
class RandomRouter(TopKRouter):
    """Frozen linear gate; see the module's docstring."""
