"""How ranks find each other, with `torchrun --rdzv-backend=private` or without: who listens where, and what is refused."""

import socket
from datetime import timedelta

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from moe_train.agent import tell_mistake
from moe_train.cli import parse
from moe_train.errors import UserError
from moe_train.parallel import mesh
from moe_train.parallel.listening import open_store
from moe_train.parallel.private_rendezvous import NAME, PrivateRendezvous


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")  # a handler sets it, and it is put back after the test


def parameters(endpoint: str = "", nodes: int = 1, **more: str) -> RendezvousParameters:
    return RendezvousParameters(NAME, endpoint, "run", nodes, nodes, local_addr="127.0.0.1", **more)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_torchrun_finds_it_and_ranks_are_told_of_its_store() -> None:
    handler = rendezvous_handler_registry.create_handler(parameters())
    assert isinstance(handler, PrivateRendezvous)  # else the package's entry points are not installed: pip install -e .
    found = handler.next_rendezvous()
    assert (found.rank, found.world_size, handler.use_agent_store) == (0, 1, True)
    told = found.bootstrap_store_info
    assert told is not None
    assert (told.master_addr, told.master_port) == ("127.0.0.1", handler.store.port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", told.master_port), 5)  # an address that all interfaces would include
    assert handler.shutdown()
    assert handler.is_closed()


def test_the_second_agent_on_a_machine_uses_the_first_ones_store() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    first, second = (PrivateRendezvous(parameters(endpoint, 2)) for _ in range(2))
    first.store.set("said", "by the first")
    assert second.store.get("said") == b"by the first"
    assert (first.host, first.store.port) == (second.host, second.store.port)


def test_an_address_of_another_machine_is_asked_and_not_held() -> None:
    with pytest.raises(RuntimeError):  # nobody answers at an address that is for documentation
        PrivateRendezvous(parameters("192.0.2.77:29400", 2, read_timeout="1"))


def test_it_does_not_begin_again_after_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = PrivateRendezvous(parameters())
    told = handler.next_rendezvous().bootstrap_store_info
    assert told is not None
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": handler.get_run_id(),
        "MASTER_ADDR": told.master_addr,
        "MASTER_PORT": str(told.master_port),
    }.items():
        monkeypatch.setenv(name, value)
    tell_mistake()
    with pytest.raises(SystemExit) as ended:
        handler.next_rendezvous()
    assert ended.value.code == 2


def test_a_holder_that_cannot_listen_says_so() -> None:
    port, patience = free_port(), timedelta(seconds=5)
    held = open_store("127.0.0.1", port, patience, "MASTER_ADDR", alone=True, holder=True)
    for host in ("127.0.0.1", "192.0.2.77"):
        with pytest.raises(UserError, match="no address of this machine, or somebody listens at port"):
            open_store(host, port, patience, "MASTER_ADDR", alone=False, holder=True)
    asked = open_store("127.0.0.1", port, patience, "MASTER_ADDR", alone=True, holder=False)
    held.set("said", "by the holder")
    assert asked.get("said") == b"by the holder"


@pytest.mark.parametrize(
    ("endpoint", "rule"),
    [
        ("", "with several nodes each has to know address and port"),
        ("127.0.0.1:0", "with several nodes each has to know address and port"),
        ("0.0.0.0:29400", "all interfaces; give the address"),
        ("[::]:29400", "all interfaces; give the address"),
        ("head:29400", "it is 127.0.1.1 here, where no other machine can reach it"),
    ],
)
def test_endpoints_that_cannot_work_are_refused(endpoint: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, look_up = {"head": "127.0.1.1"}, socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: look_up(names.get(host, host), *rest, **more))
    with pytest.raises(UserError, match=rule):
        PrivateRendezvous(parameters(endpoint, 2))


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, True),
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "10.0.0.1"}, False),
        ({"MASTER_ADDR": "10.0.0.1", "LOCAL_WORLD_SIZE": "4"}, True),
        ({"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2"}, False),  # nodes that share a network of one machine
    ],
)
def test_whether_ranks_of_other_machines_have_to_connect(
    environment: dict[str, str], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mesh._on_one_machine(4) is alone


@pytest.mark.parametrize("port", ["", "http"])
def test_an_address_without_a_port_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"MASTER_PORT={port}: ranks at MASTER_ADDR=127.0.0.1"):
        mesh.start_world(parse({"train": {"device": "cpu"}}, "test"))
