"""Which of several processes that went wrong is the cause of a failure, and how to say so. Pure."""

from core.cluster.channel import INTERNAL
from core.cluster.process import Child
from core.errors import WorkerDied

_ECHOES = (INTERNAL, WorkerDied.__name__)  # kinds of Failed that another process's death causes


def is_echo(child: Child) -> bool:
    """Whether its failure may come of another process's: ranks fail in their collectives."""
    return child.failed is not None and child.failed.kind in _ECHOES


def suspicion(child: Child) -> int:
    """0: surely the cause of a failure ... 2: perhaps the echo of another's."""
    if child.failed is not None:
        return 2 if is_echo(child) else 1
    return 0


def cause(child: Child) -> tuple[str, str]:
    """Why a child failed: one line that may be shown to clients, and the text for the terminal."""
    if child.frozen is not None:
        text = f"{child.label} {child.frozen}"
        return text, f"{text}; the engine ends"
    if child.failed is None:
        text = f"{child.label} {child.exit_text()}"
        return text, f"{text}{child.exit_hint()}; the engine ends"
    if child.failed.kind == INTERNAL:
        return f"{child.label} failed", f"{child.label} failed:\n{child.failed.message}"
    node = "" if child.spec.node is None else f"node {child.spec.node}: "
    return f"{child.label} failed: {child.failed.kind}", f"{node}{child.failed.message}"
