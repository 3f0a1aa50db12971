"""Whether a model can be evaluated with segment-level recurrence: rows that see hidden rows of the rows before."""

from moe_train.config import Config, Conflict
from moe_train.config.memory import memory_conflicts
from moe_train.errors import UserError


def check_memory(config: Config, ranks: int) -> None:
    """Raise UserError with every reason why this run's model cannot be evaluated with memory on so many data-parallel ranks."""
    found = memory_conflicts(config, "give --memory 0")
    if ranks > 1:
        rule = "with memory rows are evaluated one after the other"
        found.append(Conflict("world size", ranks, rule, "use one process, or give --memory 0"))
    if found:
        raise UserError("\n  ".join(map(str, found)))
