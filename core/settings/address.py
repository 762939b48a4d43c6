"""Addresses as people write them: "host:port". Pure."""

from core.errors import ConfigError

HIGHEST_PORT = 65535
ADDRESS_KEY = "launch.dist_init_addr"


def split_address(address: str, key: str = ADDRESS_KEY) -> tuple[str, int]:
    """Host and port of "host:port", an IPv6 host in brackets ("[fd00::1]:20000", given back without
    them). Raises ConfigError naming `key` for anything else."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    # isdecimal alone would take other scripts' digits; a colon outside brackets is IPv6 cut in two.
    readable = port.isascii() and port.isdecimal() and len(port) <= 5 and (":" in bare) == bracketed
    if not bare or not readable or any(sign in bare for sign in "[]/@ "):
        raise ConfigError(
            f"{key}={address!r}: expected HOST:PORT of node 0, for example 10.0.0.1:20000, "
            "node0:20000 or [fd00::1]:20000"
        )
    if not 1 <= int(port) <= HIGHEST_PORT:
        raise ConfigError(f"{key}={address!r}: allowed ports: 1 to {HIGHEST_PORT}")
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
