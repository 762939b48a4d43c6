"""Engines of small children under a supervisor in this process."""

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.cluster.processes.group import Group
from core.cluster.processes.process import ProcessSpec
from core.cluster.processes.signals import signal_pipe
from core.cluster.processes.supervisor import Supervisor
from core.interfaces.control import ChildStatus, Ready
from core.settings.config import LaunchConfig
from tests.support.supervised import ROOT, Run


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Runs a supervisor in this process. `children` maps a name to a mode or a boot line;
    `when_ready(run)` is called when all are ready, `on_status(run, name, status)` at each status.
    """
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}

    def run(
        children: dict[str, str | dict[str, Any]],
        *,
        when_ready: Callable[[Run], None] = lambda run: None,
        on_status: Callable[[Run, str, ChildStatus], None] = lambda run, name, status: None,
        group: Group | None = None,
        dropped_lines: Callable[[], int] = lambda: 0,
        signals: Callable[[], AbstractContextManager[socket.socket]] = signal_pipe,
        **launch: Any,
    ) -> Run:
        result = Run(tmp_path / "log")
        started = time.monotonic()

        def spec(name: str, boot: str | dict[str, Any]) -> ProcessSpec:
            boot = {"mode": boot} if isinstance(boot, str) else boot
            return ProcessSpec(
                name=name,
                module="tests.support.child",
                boot=json.dumps(boot | {"log": str(result.log)}).encode(),
                env={"PYTHONPATH": str(ROOT)},
                is_worker=name.startswith("worker"),
                node=None if group is None else group.site.node_rank,
            )

        def status(name: str, status: ChildStatus) -> None:
            result.statuses.append((name, status))
            on_status(result, name, status)

        def ready(infos: dict[str, Ready]) -> None:
            nonlocal started
            result.infos = {name: ready.info for name, ready in infos.items()}
            started = time.monotonic()
            when_ready(result)

        def error(text: str) -> None:
            result.errors.append(text)
            if not result.infos:
                nonlocal started
                started = time.monotonic()

        supervisor = Supervisor(
            [spec(name, boot) for name, boot in children.items()],
            LaunchConfig(**launch),
            on_status=status,
            on_ready=ready,
            on_error=error,
            dropped_lines=dropped_lines,
            group=group,
            signals=signals,
        )
        result.exit_code = supervisor.run()
        result.end_seconds = time.monotonic() - started
        assert psutil.Process().children(recursive=True) == []
        return result

    yield run
    assert handlers == {number: signal.getsignal(number) for number in handlers}
