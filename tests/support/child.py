"""A child process for supervisor tests; its boot line says how it behaves.

    {"mode": "worker" | "frontend" | ..., "log": path, ...}

It appends one JSON line per event to `log`, so that tests see what it did without guessing.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from core.cluster.processes.channel import Channel, exit_with_parent
from core.errors import ModelError, PlanError, WorkerDied
from core.interfaces.control import (
    Drain,
    EngineDied,
    EngineReady,
    Heartbeat,
    LinesDropped,
    Progress,
    Ready,
    StartPhase,
)

ECHO = "rank 1 does not answer"


def main() -> None:
    channel = Channel.open()
    boot = json.loads(channel.boot_line())
    if boot.get("pdeathsig", True):
        exit_with_parent()

    def log(event: str, **values: Any) -> None:
        with open(boot["log"], "a") as file:  # one small write each: lines stay whole
            file.write(json.dumps({"event": event, "pid": os.getpid(), **values}) + "\n")

    def sleep_forever() -> None:
        while True:
            signal.pause()

    log("boot", size=len(json.dumps(boot)))
    info = {"pid": os.getpid(), **boot.get("info", {})}
    try:
        match boot["mode"]:
            case "worker":
                channel.exit_at_end()
                channel.send(StartPhase("import", 0.5))
                channel.send(Progress("load weights", 1, 2, "tensors"))
                if "dropped" in boot:
                    channel.send(LinesDropped(boot["dropped"]))
                channel.send(Ready(info))
                sleep_forever()
            case "frontend":
                run_frontend(channel, boot, info, log)
                sleep_forever()
            case "deaf":  # ready, but reads nothing and ignores polite signals
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                channel.send(Ready(info))
                sleep_forever()
            case "stuck":  # serves, and its step never ends
                channel.exit_at_end()
                channel.send(Ready(info))
                channel.heartbeat(lambda: Heartbeat(boot["launched"], boot["finished"]))
                sleep_forever()
            case "hang":
                channel.send(StartPhase("import", 0.5))
                sleep_forever()
            case "model_error":
                raise ModelError("model.safetensors is truncated")
            case "plan_error":
                raise PlanError(["parallel.tp=7: 9 heads can't be cut"])
            case "bug":
                raise ZeroDivisionError("a bug")
            case "echo_then_hang":  # what a peer of a dead rank does
                channel.send(Ready(info))
                channel.listen(lambda message: None)
                Path(boot["trigger"]).read_text()  # a FIFO: blocks until the test writes
                error = ZeroDivisionError("a bug") if boot.get("bug") else WorkerDied(ECHO)
                channel.report_failure(error, boot.get("blames", ()))
                if boot.get("abort"):
                    os.abort()
                sleep_forever()
            case "silent_exit":
                sys.exit(7)
            case "parent_of_another":
                other = subprocess.Popen(["sleep", "1000"])
                channel.exit_at_end()
                channel.send(Ready(info | {"other": other.pid}))
                sleep_forever()
            case "flood":  # last words larger than a pipe, then the end
                for step in range(boot["count"]):
                    channel.send(Progress("x" * 1000, step, boot["count"], "B"))
                raise ModelError("the last word")
    except Exception as error:
        sys.exit(channel.report_failure(error))


def run_frontend(channel: Channel, boot: dict[str, Any], info: dict[str, Any], log: Any) -> None:
    """A frontend that serves nothing, and ends as it is told."""

    def handler(message: Any) -> None:
        match message:
            case EngineReady(engine_info, workers):
                log("engine_ready", info=engine_info, workers=workers)
                channel.send(Ready(info))
            case EngineDied(cause):
                log("engine_died", cause=cause)
                if not boot.get("ignore_death"):
                    os._exit(1)
            case LinesDropped(lines):
                log("lines_dropped", lines=lines)
            case Drain(grace_s):
                log("drain", grace_s=grace_s)
                if not boot.get("ignore_drain"):
                    os._exit(boot.get("drain_status", 0))
            case None:
                log("end")
                os._exit(0)

    channel.listen(handler)


if __name__ == "__main__":
    main()
