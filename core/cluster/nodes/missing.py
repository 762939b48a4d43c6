"""Whether what ended a rank is that its peers are gone: told by the error, which libraries raise.

Imports none of them: who ends before torch was imported should not wait for it.
"""

from collections.abc import Iterator

from core.errors import WorkerDied

# Classes of torch.distributed: of its store and of its connections.
_OF_CONNECTIONS = ("DistNetworkError", "DistStoreError")
# Parts of messages of collectives: gloo's names its sources; NCCL's say what it was.
_OF_COLLECTIVES = (
    "gloo/transport/",
    "ncclRemoteError",
    "ncclSystemError",
    "remote process exited",
    "communicator was aborted",
    "Connection closed by peer",
    "Connection reset by peer",
)


def missing_ranks(error: BaseException, rank: int, world_size: int) -> tuple[int, ...]:
    """The ranks any of which the error of rank `rank` misses; () where it is its own."""
    for found in _chain(error):
        if isinstance(found, WorkerDied) and found.ranks:
            return found.ranks
        if _is_of_peers(found):
            return tuple(peer for peer in range(world_size) if peer != rank)
    return ()


def _is_of_peers(error: BaseException) -> bool:
    if any(cls.__name__ in _OF_CONNECTIONS for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OF_COLLECTIVES)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
