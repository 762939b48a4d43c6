"""Every TCP port of a run over several nodes: fixed offsets from one base port. Pure.

The base is the port of node 0's address (`launch.dist_init_addr`, or what the launcher found), so
one number tells a firewall everything. Opens no socket. The collectives' own sockets (NCCL, gloo)
are not here: those libraries let the system choose.
"""

from dataclasses import dataclass

from core.errors import ConfigError
from core.parallel.plan import Plan
from core.settings.address import ADDRESS_KEY, HIGHEST_PORT, split_address

CONTROL, STORE, ENGINE, LOCKSTEP, PLANS = 0, 1, 2, 3, 16  # PLANS + d: DP rank d


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one run. Raises ConfigError where the highest is past 65535."""

    base: int
    num_dp: int  # DP ranks: each has a socket for its plans

    def __post_init__(self) -> None:
        most = HIGHEST_PORT - PLANS - self.num_dp + 1
        if not 1 <= self.base <= most:
            raise ConfigError(
                f"{ADDRESS_KEY} has port {self.base}: a run of {self.num_dp} DP ranks uses ports "
                f"up to {PLANS + self.num_dp - 1} above it; allowed: 1 to {most}"
            )

    @classmethod
    def of(cls, rendezvous: str, plan: Plan) -> "Ports":
        """The ports of a plan whose nodes meet at `rendezvous` (host:port)."""
        return cls(split_address(rendezvous)[1], plan.dp)

    @property
    def control(self) -> int:
        """Where the parents of the nodes meet, agree, and send heartbeats."""
        return self.base + CONTROL

    @property
    def store(self) -> int:
        """The store in which process groups are made."""
        return self.base + STORE

    @property
    def engine(self) -> int:
        """The frontend's requests and the leaders' answers."""
        return self.base + ENGINE

    @property
    def lockstep(self) -> int:
        """Where the leaders agree on each step."""
        return self.base + LOCKSTEP

    def plan(self, dp_rank: int) -> int:
        """The steps that the leader of a DP rank tells the other ranks of its attention group."""
        assert 0 <= dp_rank < self.num_dp, dp_rank
        return self.base + PLANS + dp_rank

    @property
    def highest(self) -> int:
        """The last one; a firewall opens `base` to this."""
        return self.plan(self.num_dp - 1)


@dataclass(frozen=True, slots=True)
class Listener:
    """One port that a process listens on, and who comes to it."""

    name: str
    port: int
    node: int  # where it is bound
    clients: str  # in words
    client_nodes: tuple[int, ...]  # where they are; may hold `node` itself

    @property
    def crosses_nodes(self) -> bool:
        """Whether another node must be able to reach it."""
        return any(node != self.node for node in self.client_nodes)


def node_of(rank: int, plan: Plan, nnodes: int) -> int:
    """The node that runs a rank: equally many neighbouring ranks are on each."""
    assert plan.world_size % nnodes == 0, (plan.world_size, nnodes)
    return rank // (plan.world_size // nnodes)


def listeners(ports: Ports, plan: Plan, nnodes: int) -> list[Listener]:
    """Every port that a plan over `nnodes` nodes uses, by port. A socket that nobody would connect
    to (of a single DP rank's lockstep, of an attention group of one rank) is not opened."""
    every_node = tuple(range(nnodes))
    leaders = [dp_rank * plan.tp_attn for dp_rank in range(plan.dp)]

    def nodes(ranks: list[int]) -> tuple[int, ...]:
        return tuple(sorted({node_of(rank, plan, nnodes) for rank in ranks}))

    found = [
        Listener("control", ports.control, 0, "the parent of every other node", every_node[1:]),
        Listener("store", ports.store, 0, "every rank", every_node),
        Listener("engine", ports.engine, 0, "the leader of every DP rank", nodes(leaders)),
    ]
    if plan.dp > 1:
        clients = f"the leaders of DP ranks 1-{plan.dp - 1}"
        found.append(Listener("lockstep", ports.lockstep, 0, clients, nodes(leaders[1:])))
    for dp_rank, leader in enumerate(leaders):
        others = plan.group("tp", leader)[1:]
        if others:
            span = f"rank {others[0]}" if len(others) == 1 else f"ranks {others[0]}-{others[-1]}"
            node = node_of(leader, plan, nnodes)
            name = f"plans of DP rank {dp_rank}"
            found.append(Listener(name, ports.plan(dp_rank), node, span, nodes(others)))
    return found


def table(ports: Ports, plan: Plan, nnodes: int) -> str:
    """The listeners as lines for a person, with a heading."""
    rows = [("port", "on node", "for", "connected to by")]
    rows += [
        (str(found.port), str(found.node), found.name, found.clients)
        for found in listeners(ports, plan, nnodes)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
