"""One file per routing method; importing this package imports all of them, which registers them."""

import pkgutil
from importlib import import_module

from moe_train.config import RouterConfig

for _file in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


def registry() -> dict[str, type[RouterConfig]]:
    """Name -> configuration class of every registered router."""
    return dict(RouterConfig.registry)
