"""Which of several processes that went wrong is the cause of a failure, and how to say so. Pure.

When one rank ends, the others fail a moment later: their messages and collectives find nobody. What
such a rank says must not be reported as the cause. A process that ends closes its status pipe
before any peer can notice, so that the parent knows it first, however long the kernel then takes to
free its memory and its GPU; and who fails because of a peer says so (`Failed.blames`).
"""

import enum
import signal
from collections.abc import Sequence

from core.cluster.processes.channel import INTERNAL
from core.cluster.processes.process import Child
from core.errors import WorkerDied

# In which a failure waits for a likelier cause to show itself, in seconds.
ENDING_S = 0.5  # for the kernel to say how a process ended that closed its files
SETTLE_S = 0.25  # for what may come of another's end without saying so
BLAMED_S = 0.5  # for the blamed process to end by itself, or its node to say that it did


class Suspicion(enum.IntEnum):
    """How likely a process that went wrong is the cause; the lowest is."""

    ENDED = 0  # by itself or by a signal, or it stands still
    TOLD = 1  # an error for users
    FELL = 2  # a bug, or libraries' way to give up: may come of another's end
    BLAMES = 3  # another's end, by its own word


def suspicion(child: Child) -> Suspicion:
    """Of a child that went wrong."""
    failed = child.failed
    if failed is None:
        aborted = child.ended_as == -signal.SIGABRT  # as NCCL's and gloo's threads do
        return Suspicion.FELL if aborted and child.frozen is None else Suspicion.ENDED
    if failed.blames:
        return Suspicion.BLAMES
    return Suspicion.FELL if failed.kind in (INTERNAL, WorkerDied.__name__) else Suspicion.TOLD


def likeliest(suspects: Sequence[Child]) -> Child:
    """The likeliest cause; of equals the one that went wrong first."""
    return min(suspects, key=lambda child: (suspicion(child), child.wrong_s))


def patience_s(culprit: Child) -> float:
    """How long after the first failure to wait for a likelier one, or for how it ended."""
    match suspicion(culprit):
        case Suspicion.ENDED:
            return ENDING_S if culprit.ended_as is None and culprit.frozen is None else 0.0
        case Suspicion.TOLD:
            return 0.0
        case Suspicion.FELL:
            return SETTLE_S
        case Suspicion.BLAMES:
            return BLAMED_S


def cause(child: Child, children: Sequence[Child] = ()) -> tuple[str, str]:
    """Why a child failed: one line that may be shown to clients, and the text for the terminal.
    `children`: those of this node, whom it may blame."""
    if child.frozen is not None:
        text = f"{child.label} {child.frozen}"
        return text, f"{text}; the engine ends"
    failed = child.failed
    if failed is None:
        text = f"{child.label} {child.exit_text()}"
        return text, f"{text}{child.exit_hint()}; the engine ends"
    if failed.blames:
        names = " or ".join(_label(name, children) for name in failed.blames)
        brief = f"{names} stopped answering"
        return brief, f"{brief}, as {child.label} found: {failed.message}"
    if failed.kind == INTERNAL:
        return f"{child.label} failed", f"{child.label} failed:\n{failed.message}"
    node = "" if child.spec.node is None else f"node {child.spec.node}: "
    return f"{child.label} failed: {failed.kind}", f"{node}{failed.message}"


def _label(name: str, children: Sequence[Child]) -> str:
    return next((child.label for child in children if child.spec.name == name), name)
