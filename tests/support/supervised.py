"""One supervised engine of small children (tests/support/child.py), and what befalls it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.interfaces.control import ChildStatus

ROOT = Path(__file__).parents[2]
END_LIMIT_S = 2.0  # what the engine promises from a failure to the end of the last process


@dataclass
class Run:
    """One supervised engine, after its end."""

    log: Path
    exit_code: int = -1
    errors: list[str] = field(default_factory=list)
    statuses: list[tuple[str, ChildStatus]] = field(default_factory=list)
    infos: dict[str, Any] = field(default_factory=dict)
    end_seconds: float = 0.0  # from the event that the test causes

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]


def kill(name: str, number: int) -> Callable[[Run], None]:
    return lambda run: os.kill(run.infos[name]["pid"], number)


def signal_self(*numbers: int) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


HEALTHY = {"worker 0": "worker", "worker 1": "worker", "frontend": "frontend"}
