"""What plugins run beside a rank, from before it loads the model to the end of its process.

One thread enters and leaves all of it: the main thread may sit in a collective that never ends,
while the process must be able to end. Knows nothing of what plugins do there.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from core.errors import PluginError

HOOK = "worker_lifespan"
CLEAN_LEAVE_S = 4.0  # where the engine was asked to end; then the process ends without waiting
FAILED_LEAVE_S = 0.5  # where this rank failed: nothing is told of that before

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lifespan:
    """What one plugin returned from the hook."""

    plugin: str
    manager: AbstractContextManager[Any]


class Lifespans:
    """`enter` once, `leave` at the end; one that is left before it was entered never begins."""

    def __init__(self) -> None:
        self._asked_to_leave = threading.Event()
        self._entered = threading.Event()  # or failed to
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self._busy_with = ""  # the plugin that is being entered or left
        self._problem: BaseException | None = None
        self._error: BaseException | None = None  # that those which leave are told

    def enter(
        self,
        lifespans: Sequence[Lifespan],
        *,
        prepare: Callable[[], object] = lambda: None,
        on_begin: Callable[[str], None] = lambda plugin: None,
    ) -> None:
        """Enter all, one after the other; blocks until they are. `prepare` is called first in their
        thread, `on_begin` before each. Raises PluginError for the first that fails; those before it
        are being left then."""
        if not lifespans:
            return
        self._thread = threading.Thread(
            target=self._run,
            args=(list(lifespans), prepare, on_begin),
            name="nodeweave-lifespans",
            daemon=True,
        )
        self._thread.start()
        self._entered.wait()
        if self._problem is not None:
            raise self._problem

    def leave(self, error: BaseException | None, limit_s: float) -> None:
        """Leave all that were entered, the last one first; from any thread, again it only waits.
        `error`: why this rank ends, None where it was asked to. Returns after `limit_s` at the
        latest, and says then whom it did not wait for."""
        if not self._asked_to_leave.is_set():
            self._error = error
            self._asked_to_leave.set()
        if self._thread is not None and not self._left.wait(limit_s):
            log.error(
                "plugin %r is still in its %s after %g s; the process ends without waiting for it",
                self._busy_with,
                HOOK,
                limit_s,
            )

    def _run(
        self,
        lifespans: Sequence[Lifespan],
        prepare: Callable[[], object],
        on_begin: Callable[[str], None],
    ) -> None:
        entered: list[Lifespan] = []
        try:
            prepare()
            for each in lifespans:
                if self._asked_to_leave.is_set():
                    break
                self._busy_with = each.plugin
                on_begin(each.plugin)
                each.manager.__enter__()
                entered.append(each)
        except BaseException as error:  # SystemExit would end this thread silently
            log.error("plugin %r failed in %s", self._busy_with, HOOK, exc_info=error)
            self._problem = _problem(self._busy_with, error) if self._busy_with else error
            self._error = self._error or error
            self._asked_to_leave.set()
        self._entered.set()
        self._asked_to_leave.wait()
        for each in reversed(entered):
            self._leave(each)
        self._left.set()

    def _leave(self, lifespan: Lifespan) -> None:
        self._busy_with = lifespan.plugin
        error = self._error
        try:
            lifespan.manager.__exit__(
                None if error is None else type(error),
                error,
                None if error is None else error.__traceback__,
            )
        except BaseException as raised:
            if raised is not error:  # a generator raises again what it was told
                log.error("plugin %r failed as it left %s", lifespan.plugin, HOOK, exc_info=raised)


def require_manager(plugin: str, made: object) -> Lifespan:
    """Raises PluginError for what is no context manager."""
    if not (hasattr(made, "__enter__") and hasattr(made, "__exit__")):
        raise PluginError(
            f"plugin {plugin!r} returned a {type(made).__name__} from {HOOK}; it must be a context "
            "manager (contextlib.contextmanager makes one of a generator), or None"
        )
    return Lifespan(plugin, made)


def _problem(plugin: str, error: BaseException) -> PluginError:
    return PluginError(
        f"plugin {plugin!r} failed in {HOOK}: {type(error).__name__}: {error}\n"
        f"start without it: plugins.blocklist=[{plugin}]"
    )
