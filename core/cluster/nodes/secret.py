"""The cluster token: the one secret that the nodes of an engine share, and the keys made of it.

Opens no socket. The token comes from a file or the environment, never from the command line,
which every user of a machine can read.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import ConfigError
from core.settings.config import MAKE_A_TOKEN, TOKEN_VARIABLE, ClusterConfig

MIN_TOKEN_BYTES = 16
MAX_TOKEN_BYTES = 4096
KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class ClusterKeys:
    """Keys for one purpose each; knowing one tells nothing of another or of the token."""

    link: bytes = field(repr=False)  # of `core.cluster.nodes.link`
    wire: str = field(repr=False)  # hex, of the workers' sockets: `Endpoints.key`


def load_keys(config: ClusterConfig, environment: Mapping[str, str] = os.environ) -> ClusterKeys:
    """The keys of the token from `cluster.token_file`, else from the environment.

    Raises ConfigError where there is none, it is too short, or others may read its file.
    """
    if config.token_file is not None:
        source, token = f"cluster.token_file={config.token_file}", _read(config.token_file)
    elif environment.get(TOKEN_VARIABLE):
        source, token = TOKEN_VARIABLE, environment[TOKEN_VARIABLE].encode()
    else:
        raise ConfigError(
            f"nodes need a secret that they know each other by, and there is none; {MAKE_A_TOKEN}"
        )
    token = token.strip()
    if not MIN_TOKEN_BYTES <= len(token) <= MAX_TOKEN_BYTES:
        raise ConfigError(
            f"the cluster token ({source}) has {len(token)} bytes; allowed: {MIN_TOKEN_BYTES} to "
            f"{MAX_TOKEN_BYTES}; {MAKE_A_TOKEN}"
        )
    return derive(token)


def derive(token: bytes) -> ClusterKeys:
    """The keys of a token."""
    # blake2b takes keys of 64 bytes at most: longer tokens are hashed to that first.
    secret = hashlib.blake2b(token, person=b"nodeweave token").digest()
    return ClusterKeys(link=_key(secret, b"link"), wire=_key(secret, b"wire").hex())


def _key(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(
        key=secret, person=b"nodeweave " + purpose, digest_size=KEY_BYTES
    ).digest()


def _read(path: str) -> bytes:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(
                    f"cluster.token_file={path}: other users may use this file (mode "
                    f"{stat.S_IMODE(mode):04o}); run `chmod 600 {path}`"
                )
            return file.read(MAX_TOKEN_BYTES + 2)
    except OSError as error:
        raise ConfigError(f"cluster.token_file={path}: {error.strerror}; {MAKE_A_TOKEN}") from error
