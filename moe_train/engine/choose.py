"""The engine that a run asks for."""

from moe_train.config import Config
from moe_train.engine.native import NativeEngine
from moe_train.parallel.mesh import World


def make_engine(config: Config, world: World) -> NativeEngine:
    """The engine of `engine.name`; all share the native one's model, losses and checkpoints. Raises UserError where it is missing."""
    if config.engine.name == "native":
        return NativeEngine(config, world)
    from moe_train.engine.deepspeed import DeepSpeedEngine  # imported here for those alone who ask for it

    return DeepSpeedEngine(config, world)
