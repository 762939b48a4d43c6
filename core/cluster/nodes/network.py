"""What the nodes need to know of this machine's network: addresses, interfaces, ports in use.

Knows nothing of plans and messages.
"""

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping

import psutil

from core.errors import ConfigError, ResourceError
from core.settings.address import ADDRESS_KEY, join_address

# What the collectives' libraries read to choose the interface that their own sockets use.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def own_address(host: str) -> str:
    """The address of this machine that `host` (a name or an address) means.

    Raises ConfigError where it means none, as on a machine that is not node 0.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{ADDRESS_KEY}: the host {host!r} is not known: {error}") from error
    candidates = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    own = _addresses()
    for address in candidates:
        # 127.0.0.0/8 and ::1 are this machine's, whichever of them an interface names.
        if address not in own and not _is_loopback(address):
            continue
        if _is_loopback(address) and host not in ("localhost", address):
            raise ConfigError(
                f"{ADDRESS_KEY}: on this machine the name {host!r} means {address}, which no other "
                f"node can reach; give the address instead: {', '.join(_outer(own)) or 'none'}"
            )
        return address
    raise ConfigError(
        f"{ADDRESS_KEY}: node 0 listens at {host} ({', '.join(candidates)}), and that is no "
        f"address of this machine, which has {', '.join(_outer(own)) or 'none'}; start "
        "launch.node_rank=0 on the machine that has it, or correct the address on every node"
    )


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this address; None where none does."""
    plain = address.partition("%")[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == plain for entry in entries):
            return name
    if _is_loopback(address):
        names = [name for _, name in socket.if_nameindex()]
        return next((name for name in ("lo", "lo0") if name in names), None)
    return None


def interface_environment(
    address: str, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Variables that keep the collectives on the interface which has `address`. What the user set
    stays. Raises ConfigError where that is an interface no other node can reach."""
    _check_chosen(address, environment)
    name = interface_of(address)
    if name is None:
        return {}
    return {variable: name for variable in INTERFACE_VARIABLES if variable not in environment}


def _check_chosen(address: str, environment: Mapping[str, str]) -> None:
    """Refuse interfaces over which ranks would wait for each other in vain. NCCL's variable may
    hold patterns, so only gloo's is looked at."""
    variable = INTERFACE_VARIABLES[0]
    chosen = environment.get(variable)
    if chosen is None:
        return
    own = psutil.net_if_addrs()
    for name in chosen.split(","):
        way_out = f"unset it, or set it to the interface of {address}"
        if name not in own:
            raise ConfigError(
                f"the environment variable {variable}={chosen} names {name!r}, which is no "
                f"interface of this machine ({', '.join(own)}); {way_out}"
            )
        families = (socket.AF_INET, socket.AF_INET6)
        addresses = [entry.address for entry in own[name] if entry.family in families]
        is_inner = bool(addresses) and all(_is_loopback(a.partition("%")[0]) for a in addresses)
        if is_inner and not _is_loopback(address):
            raise ConfigError(
                f"the environment variable {variable}={chosen}: no other node can reach this one "
                f"over {name}; {way_out}"
            )


def interface_text(address: str, environment: Mapping[str, str] = os.environ) -> str:
    """The same in words, for the user."""
    name = interface_of(address)
    own = [f"{name}={environment[name]}" for name in INTERFACE_VARIABLES if name in environment]
    chosen = f"interface {name} ({address})" if name else f"the interface of {address}, unknown"
    return f"{chosen}; set in the environment: {', '.join(own)}" if own else chosen


def listen(address: str, port: int, purpose: str) -> socket.socket:
    """A listening socket on that address alone. Raises ResourceError naming who has the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ResourceError(
            f"can't listen at {join_address(address, port)} for {purpose}: "
            f"{os.strerror(error.errno or 0)}"
            f"{_owner_text(port)}; end it, or choose another port in {ADDRESS_KEY}, the same on "
            "every node"
        ) from error


def require_free(address: str, ports: Iterable[tuple[str, int]]) -> None:
    """Raise ResourceError where something listens at one of these (purpose, port) already."""
    for purpose, port in ports:
        listen(address, port, purpose).close()


def _owner_text(port: int) -> str:
    """ " (pid 12: python -m x)", as far as this user may see it."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # some systems tell only root
        return ""
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        if connection.laddr.port != port:
            continue
        if connection.pid is None:
            return " (by another user's process)"
        try:
            command = " ".join(psutil.Process(connection.pid).cmdline())
        except psutil.Error:  # it ended, or is not ours to look at
            command = ""
        return f" (pid {connection.pid}{': ' if command else ''}{command[:120]})"
    return ""


def _addresses() -> list[str]:
    return [
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]


def _outer(addresses: list[str]) -> list[str]:
    return [address for address in addresses if not _is_loopback(address)]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
