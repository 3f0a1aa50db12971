"""The whole run as one typed tree: every key that a run file may hold, its default, its meaning and its rules.

Reading files and words into this tree, and reporting what is wrong with them, is `moe_train.cli`. Each router declares its own keys
beside itself, as a subclass of `RouterConfig`; `model.router.name` chooses among the registered ones.
"""

from moe_train.config.base import Conflict, Probability, Section
from moe_train.config.model import ModelConfig
from moe_train.config.parallel import ParallelSection
from moe_train.config.router import RouterConfig
from moe_train.config.run import Config, build_schema
from moe_train.config.sections import DataSection, OptimSection

__all__ = [
    "Config",
    "Conflict",
    "DataSection",
    "ModelConfig",
    "OptimSection",
    "ParallelSection",
    "Probability",
    "RouterConfig",
    "Section",
    "build_schema",
]
