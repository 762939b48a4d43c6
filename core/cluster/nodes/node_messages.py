"""What the parents of the nodes tell each other, over `core.cluster.nodes.link`. Data only.

Every node has one link, to node 0, which passes on what all must know.
"""

import msgspec

from core.interfaces.control import ChildStatus


class Join(msgspec.Struct, frozen=True, tag=True):
    """First, to node 0: who comes."""

    node_rank: int
    nnodes: int  # as this node was told
    address: str  # its own, on the interface of the link
    host: str  # the machine's name
    pid: int


class Doing(msgspec.Struct, frozen=True, tag=True):
    """To node 0: the phase this node is in from now on."""

    phase: str


class Facts(msgspec.Struct, frozen=True, tag=True):
    """To node 0: what must be the same everywhere; see `core.cluster.nodes.agreement`."""

    values: dict[str, str]


class Agreed(msgspec.Struct, frozen=True, tag=True):
    """From node 0: everyone is here and the facts agree; start the workers."""

    addresses: list[str]  # of the nodes, by node rank


class Said(msgspec.Struct, frozen=True, tag=True):
    """To node 0: the status of a process of this node, for the view of all."""

    process: str
    status: ChildStatus


class WorkersReady(msgspec.Struct, frozen=True, tag=True):
    """To node 0: every worker of this node serves."""


class End(msgspec.Struct, frozen=True, tag=True):
    """Either way: the engine ends because of an error, everywhere and at once."""

    text: str  # for people, naming the node
    brief: str  # one line that may be shown to clients
    exit_code: int


class Leave(msgspec.Struct, frozen=True, tag=True):
    """To node 0: this node was asked to end (SIGTERM), so drain and then stop everyone."""

    signal: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """From node 0: all requests are done; end with status 0."""


class Bye(msgspec.Struct, frozen=True, tag=True):
    """To node 0: every process of this node ended as it was told to; the link closes now."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Either way, several times a second: this node's parent lives and the link carries."""


NodeMessage = Join | Doing | Facts | Agreed | Said | WorkersReady | End | Leave | Stop | Bye | Alive
