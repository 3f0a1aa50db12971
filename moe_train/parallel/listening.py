"""A store that listens on one address. Left to itself torch's TCPStore listens on all interfaces, whatever host it is given."""

import errno
import socket
from datetime import timedelta
from ipaddress import ip_address

from torch.distributed import TCPStore

from moe_train.errors import UserError


def open_store(host: str, port: int, timeout: timedelta, name: str, alone: bool, holder: bool | None = None) -> TCPStore:
    """A connection to the store at `host`, which this process holds if it is the `holder`.

    None: it is, if that is an address of this machine on which nobody listens at `port`. Port 0 is any that is free. `alone`: nobody on
    another machine needs the store. Raises UserError for a host that cannot serve, which the user knows as `name`, and torch's
    DistNetworkError where nobody answers within `timeout`.
    """
    listener = _listen(host, port, name, alone) if holder in (None, True) else None
    if listener is None and holder:
        raise UserError(f"{name}={host}: no address of this machine, or somebody listens at port {port} already; give another")
    if listener is None:
        return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store closes it
    return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor)


def _listen(host: str, port: int, name: str, alone: bool) -> socket.socket | None:
    """A socket that listens on the address of `host` and no other; None where that is not here, or somebody listens already."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"{name}={host}: no address is known for it ({error}); give one") from None
    ip = ip_address(str(address[0]))
    if ip.is_unspecified:
        raise UserError(f"{name}={host}: all interfaces; give the address by which other machines reach this one")
    if ip.is_loopback and not alone and host not in ("localhost", str(ip)):
        raise UserError(
            f"{name}={host}: it is {ip} here, where no other machine can reach it; give the address by which they do"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return None
        raise
    return listener
