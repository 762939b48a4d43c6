"""What happens on the links of a node, as the thread that keeps them tells it.

Plain data. Knows nothing of sockets, or of what an event means for the processes of a node.
"""

from dataclasses import dataclass

from core.cluster.nodes.node_messages import NodeMessage


@dataclass(frozen=True, slots=True)
class Arrived:
    """A peer proved that it has the token."""

    peer: int
    address: str  # host:port


@dataclass(frozen=True, slots=True)
class Turned:
    """Somebody came and was refused: no peer."""

    address: str
    reason: str
    wrong_token: bool


@dataclass(frozen=True, slots=True)
class TurnedMore:
    """So many more were refused than the main thread could be told of."""

    number: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message from a peer."""

    peer: int
    message: NodeMessage


@dataclass(frozen=True, slots=True)
class Lost:
    """A link ended; nothing more comes from this peer."""

    peer: int
    reason: str
    silent: bool  # no sign of life for the timeout, where the connection itself said nothing


@dataclass(frozen=True, slots=True)
class Broken:
    """The thread ended because of a bug: there are no links any more, and nobody is let in."""

    reason: str


Event = Arrived | Turned | TurnedMore | Received | Lost | Broken
