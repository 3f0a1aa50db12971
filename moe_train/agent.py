"""What a rank and the torchrun that has started it have in common: a store, and a word that ends all further starts."""

import os
from datetime import timedelta

import torch.distributed as dist

from moe_train.patience import within

ANSWER_SECONDS = 5.0  # that a store gets
MISTAKE = "mistake"


def part_of(store: dist.Store, run_id: str) -> dist.Store:
    """The part of torchrun's store that belongs to the ranks of one run; several may share a store."""
    return dist.PrefixStore(f"ranks/{run_id}", store)


def tell_mistake() -> None:
    """Tell `torchrun --rdzv-backend=private` that ranks which start again would make the same mistake. Others do not ask."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        within(ANSWER_SECONDS, _tell_mistake)


def _tell_mistake() -> None:
    host, port, patience = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=ANSWER_SECONDS)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
    part_of(store, os.environ["TORCHELASTIC_RUN_ID"]).set(MISTAKE, "made")
