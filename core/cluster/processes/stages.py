"""What a supervisor waits for, from its start to its end, and how long.

Knows nothing of processes; `core.cluster.processes.supervisor` says what leads where.
"""

import enum

FAREWELL_S = 1.5  # for frontends to end their streams after a worker died
STOP_S = 1.0  # for processes to end by themselves after a failure, before they are killed
CLEAN_STOP_S = 5.0  # the same where nothing failed
KILL_S = 5.0  # for the kernel to end what was killed


class Stage(enum.Enum):
    """What the supervisor is waiting for."""

    STARTING = "every process is ready"
    RUNNING = "a signal or a failure"
    DRAINING = "the frontends finish what they accepted"
    LEAVING = "node 0 lets its frontends finish"
    FAILING = "the frontends tell their clients"
    STOPPING = "every process ends by itself"
    KILLING = "every process was ended"


LIVE = (Stage.STARTING, Stage.RUNNING, Stage.DRAINING, Stage.LEAVING)
