"""One file per routing method; importing this package registers them all."""

from moe_train.config import RouterConfig
from moe_train.routers import recurrent, topk

__all__ = ["recurrent", "registry", "topk"]


def registry() -> dict[str, type[RouterConfig]]:
    """Name -> configuration class of every registered router."""
    return dict(RouterConfig.registry)
