"""Keys that all routers have, the registry of routers, and the field that chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import GetCoreSchemaHandler, PositiveInt
from pydantic_core import CoreSchema, core_schema

from moe_train.config.base import Conflict, Section

if TYPE_CHECKING:
    from moe_train.config.model import ModelConfig
    from moe_train.config.parallel import ParallelSection


class RouterConfig(Section):
    """Base of every router's keys. Defining a subclass with a literal `name` registers it."""

    registry: ClassVar[dict[str, type[RouterConfig]]] = {}
    reads_labels: ClassVar[bool] = False  # True where a document's label decides
    freezes: ClassVar[bool] = False  # True where the router freezes parameters in mid-run (`Router.frozen`)

    name: str
    """which router"""
    top_k: PositiveInt = 2
    """experts per token"""
    frozen: bool = False
    """the routers' own parameters are not trained (fine-tuning)"""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass. Two different routers of one name are a programming error."""
        name = cls.model_fields["name"].default
        if not isinstance(name, str):
            return
        other = RouterConfig.registry.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two routers are named {name!r}: {other} and {cls}")
        RouterConfig.registry[name] = cls

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """Rules between this router's keys and the model's; a subclass adds its own to these."""
        if self.top_k > model.num_experts:
            rule = f"must be at most model.num_experts={model.num_experts}"
            return [Conflict("model.router.top_k", self.top_k, rule, "lower it or add experts")]
        return []

    def layout_conflicts(self, parallel: ParallelSection) -> list[Conflict]:
        """Axes under which this router cannot work; none by default."""
        return []

    def loss_weights(self) -> dict[str, float]:
        """Weight of each entry of Routing.losses in the training loss."""
        return {}

    def active_experts(self, model: ModelConfig) -> int:
        """How many experts' work one token costs in a layer."""
        return self.top_k

    def left_out(self) -> Sequence[str]:
        """Parameters of such a router that these keys do without, when a run starts from the weights of one that has them."""
        return ()

    def leaks(self) -> list[str]:
        """What these keys let a token see that a causal model must not, one line each; said when a run starts."""
        return []

    def adaptive_layers(self, model: ModelConfig) -> Sequence[int]:
        """Blocks whose gate adapts to clusters of tokens (ACMoE); `c` in `model.transformer_xl.layers`."""
        return ()


class RegisteredRouter:
    """Annotation: validated as the registered RouterConfig that `name` says (a union over the routers known when it is built)."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not RouterConfig.registry:  # this module alone was imported; build_schema() runs again before anything is read
            return handler.generate_schema(RouterConfig)
        choices = {name: handler.generate_schema(kind) for name, kind in sorted(RouterConfig.registry.items())}
        return core_schema.tagged_union_schema(choices, discriminator="name")


def default_router() -> RouterConfig:
    """The flagship's router."""
    return RouterConfig.registry["recurrent"](name="recurrent")
