"""Closes the ports that gloo listens at once a group is made. Knows no group and no plan.

Gloo takes whoever connects and keeps the connection open for as long as the process lives: a
stranger who reaches the port takes the process's file descriptors one by one. It needs the port
only while a group is made, as every pair of ranks is connected before that returns. A listening
socket can't be taken from gloo's own thread, so the kernel is told to drop what arrives there.
"""

import contextlib
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator

# <asm-generic/socket.h>; `socket` does not name it.
_SO_ATTACH_FILTER = 26
# <linux/filter.h>: return 0, that is, drop the packet.
_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)


@contextlib.contextmanager
def closed_afterwards() -> Iterator[None]:
    """Nobody can connect any more to sockets that this process began to listen at within the
    block. Connections made until then are not touched. Does nothing on systems but Linux."""
    before = _listening()
    yield
    for descriptor in _listening() - before:
        with _borrowed(descriptor) as listener:
            _drop_all(listener)


def _listening() -> set[int]:
    """Descriptors of TCP sockets that listen."""
    if sys.platform != "linux":
        return set()
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), _borrowed(int(name)) as candidate:
            is_tcp = candidate.family in (socket.AF_INET, socket.AF_INET6)
            if is_tcp and candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(int(name))
    return found


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket object for somebody else's descriptor, which stays open. OSError: no socket."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def _drop_all(listener: socket.socket) -> None:
    program = ctypes.create_string_buffer(_DROP, len(_DROP))
    described = struct.pack("HP", 1, ctypes.addressof(program))  # struct sock_fprog
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
