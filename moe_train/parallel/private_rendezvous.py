"""torchrun's rendezvous with one port, on one address: `torchrun --rdzv-backend=private`.

torchrun's own rendezvous (c10d) listens on all interfaces, whatever --rdzv-endpoint says, and so does a second store that it opens for
the ranks. This is the same dynamic rendezvous over one store whose socket is bound here: to the loopback interface, or to the address
that --rdzv-endpoint names. The agent whose machine has that address holds the store. All agents and ranks use it, so that no other
port is opened, and a node that joins later finds what the others found (torch 2.11 to 2.13 publish the address of the second store
once, and not to those that come later).
"""

import os
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousHandlerCreator,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from moe_train.agent import MISTAKE, part_of
from moe_train.errors import UserError
from moe_train.parallel.listening import open_store

NAME = "private"
LOOPBACK = "127.0.0.1"
PORT = 29400  # of several nodes, where the endpoint names none: that of c10d
MISTAKE_STATUS = 2  # with which ranks end that have met a mistake


class PrivateRendezvous(RendezvousHandler):
    """torch's dynamic rendezvous, but for the store that ranks are told of, and for starts that would be in vain."""

    def __init__(self, params: RendezvousParameters) -> None:
        self.host, self.store = _open_store(params)
        self._own = part_of(self.store, params.run_id)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the handler opens the second store
        self._handler = create_handler(self.store, C10dRendezvousBackend(self.store, params.run_id), params)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes; SystemExit where a rank has told of a mistake, which it would only make again."""
        if self._own.check([MISTAKE]):
            raise SystemExit(MISTAKE_STATUS)
        found = self._handler.next_rendezvous()
        return RendezvousInfo(found.store, found.rank, found.world_size, RendezvousStoreInfo(self.host, self.store.port))

    @property
    def use_agent_store(self) -> bool:
        """Ranks connect to the agents' store."""
        return True

    def get_backend(self) -> str:
        """The name by which torchrun knows it."""
        return NAME

    def is_closed(self) -> bool:
        """Whether no more nodes can join."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """Let no more nodes join."""
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        """Nodes that want to join."""
        return self._handler.num_nodes_waiting()

    def get_run_id(self) -> str:
        """--rdzv-id."""
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        """Close it."""
        return self._handler.shutdown()


def creator() -> RendezvousHandlerCreator:
    """What torchrun calls to make one."""
    return PrivateRendezvous


def _open_store(params: RendezvousParameters) -> tuple[str, TCPStore]:
    """The host that all use, and a connection to the store there."""
    alone = params.max_nodes == 1
    host, port = parse_rendezvous_endpoint(params.endpoint or LOOPBACK, default_port=0 if alone else PORT)
    if not alone and (not params.endpoint or not port):
        rule = "with several nodes each has to know address and port of the one that holds the store"
        raise UserError(f"--rdzv-endpoint={params.endpoint}: {rule}; give --rdzv-endpoint=ADDRESS:{PORT}")
    timeout = timedelta(seconds=params.get_as_int("read_timeout", 60) or 60)
    return host, open_store(host, port, timeout, "--rdzv-endpoint", alone)
