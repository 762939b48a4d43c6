"""Whether a node that comes can take part, by what it says of itself.

A pure function. Knows nothing of links, and not whether the nodes agree on their configuration.
"""

from core.cluster.nodes.node_messages import Join


def join_problem(
    join: Join, address: str, *, nnodes: int, known: tuple[Join, str] | None
) -> str | None:
    """Why not, or None. `known`: what a node of that rank said before, and its address."""
    who = f"{address} ({join.host}, pid {join.pid})"
    if join.nnodes != nnodes:
        return (
            f"{who} has launch.nnodes={join.nnodes}, node 0 has launch.nnodes={nnodes}; start "
            "all nodes with the same number"
        )
    if not 1 <= join.node_rank < nnodes:
        return (
            f"{who} has launch.node_rank={join.node_rank}; allowed for launch.nnodes={nnodes} "
            f"are 0 (this node) and 1 to {nnodes - 1}, each once"
        )
    if known is not None:
        other, other_address = known
        return (
            f"launch.node_rank={join.node_rank} was given to two nodes: "
            f"{other_address} ({other.host}, pid {other.pid}) and {who}; "
            f"give each node its own, 0 to {nnodes - 1}"
        )
    return None
