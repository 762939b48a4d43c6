"""Compares the facts of all nodes and says what differs, where, and what to change. Pure."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from core.cluster.nodes.facts import MISSING

MAX_SHOWN = 12  # differences of one kind that are listed before the rest is counted
_MAX_VALUE_CHARACTERS = 160
_ADVICE = {
    "config": "start every node with the same command, but for launch.node_rank",
    "code": "install the same version of Nodeweave",
    "plugin": "install the same version of the plugin, or block it with plugins.blocklist",
    "package": "install the same version",
    "model": "copy the same model files",
    "weights": "copy the same model files",
    "machine": "use the same kind of device, or set engine.device on every node",
}


def differences(facts: Mapping[int, Mapping[str, str]]) -> list[str]:
    """One sentence for each thing that is not the same on all nodes (`facts` is by node rank):
    its name, every value and who has it, and which node to change."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for key in dict.fromkeys(key for found in facts.values() for key in found):
        values = {node: found.get(key, MISSING) for node, found in facts.items()}
        if len(set(values.values())) > 1:
            by_kind[key.partition(" ")[0]].append(_difference(key, values))
    lines: list[str] = []
    for kind, found in by_kind.items():
        lines += found[:MAX_SHOWN]
        if len(found) > MAX_SHOWN:
            lines.append(f"{kind}: {len(found) - MAX_SHOWN} more differ")
        lines.append(f"{_who(facts, kind)}: {_ADVICE[kind]}")
    return lines


def report(facts: Mapping[int, Mapping[str, str]]) -> str | None:
    """The text of all differences; None where there are none."""
    lines = differences(facts)
    if not lines:
        return None
    return "the nodes differ, so nothing was started:\n" + "\n".join(
        f"  - {line}" for line in lines
    )


def _difference(key: str, values: Mapping[int, str]) -> str:
    kind, _, name = key.partition(" ")
    nodes: dict[str, list[int]] = defaultdict(list)
    for node, value in values.items():
        nodes[value].append(node)
    parts = [f"{_node_names(owners)} {_shown(value, owners)}" for value, owners in nodes.items()]
    return f"{name if kind == 'config' else key}: {'; '.join(parts)}"


def _who(facts: Mapping[int, Mapping[str, str]], kind: str) -> str:
    """The nodes to change: those that are not with the majority (with node 0 in a tie)."""
    odd: set[int] = set()
    for key in {key for found in facts.values() for key in found}:
        if key.partition(" ")[0] != kind:
            continue
        values = {node: found.get(key, MISSING) for node, found in facts.items()}
        counts = Counter(values.values())
        most = max(counts.values())
        leading = [value for value, count in counts.items() if count == most]
        right = values[0] if values.get(0) in leading else leading[0]
        odd |= {node for node, value in values.items() if value != right}
    return f"change {_node_names(sorted(odd))}"


def _node_names(nodes: list[int]) -> str:
    return f"{'node' if len(nodes) == 1 else 'nodes'} {', '.join(map(str, nodes))}"


def _shown(value: str, owners: list[int]) -> str:
    if value == MISSING:
        return "does not have it" if len(owners) == 1 else "do not have it"
    cut = value[:_MAX_VALUE_CHARACTERS]
    return f"{'has' if len(owners) == 1 else 'have'} {value if value == cut else cut + '...'}"
