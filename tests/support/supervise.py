"""A supervisor in a process of its own, for tests that kill it or press Ctrl-C.

    python -m tests.support.supervise LOG MEANS

MEANS is how the children notice the supervisor's end: "end of input" or "pdeathsig".

Prints the pids of its two workers and its frontend as a JSON line once they are ready.
"""

import json
import sys

from core.cluster.processes.process import ProcessSpec
from core.cluster.processes.supervisor import Supervisor
from core.interfaces.control import Ready
from core.settings.config import LaunchConfig


def main() -> None:
    log, means = sys.argv[1:]

    def spec(name: str, mode: str) -> ProcessSpec:
        by_signal = means == "pdeathsig"
        boot = {"mode": "deaf" if by_signal else mode, "log": log, "pdeathsig": by_signal}
        return ProcessSpec(
            name=name,
            module="tests.support.child",
            boot=json.dumps(boot).encode(),
            is_worker=mode != "frontend",
        )

    def on_ready(infos: dict[str, Ready]) -> None:
        print(json.dumps([ready.info["pid"] for ready in infos.values()]), flush=True)

    supervisor = Supervisor(
        [spec("worker 0", "worker"), spec("worker 1", "worker"), spec("frontend", "frontend")],
        LaunchConfig(),
        on_status=lambda name, status: None,
        on_ready=on_ready,
        on_error=lambda text: print(text, file=sys.stderr),
    )
    sys.exit(supervisor.run())


if __name__ == "__main__":
    main()
