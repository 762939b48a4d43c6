"""Threads that take turns: one runs at a time, and chance decides who goes on.

Code with blocking calls is run under many interleavings, each given by a seed, and where nobody can
go on that is found at once instead of after a timeout.

    world = World(seed)
    world.spawn("consumer", lambda: world.wait_until(lambda: queue, "a message"))
    world.run("producer", lambda: queue.append(1))
"""

import random
import threading
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 60.0  # for one turn: code that computes forever


class Deadlock(AssertionError):
    """Nobody can go on; says what everybody waits for."""


class _End(BaseException):
    """Ends the threads of a world whose main one is done."""


class _Actor:
    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], Any] = lambda: True
        self.waits_for = "its start"
        self.done = False


class World:
    """Makes and runs the threads. Only the one whose turn it is touches anything."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._actors: dict[str, _Actor] = {}
        self._threads: list[threading.Thread] = []
        self._local = threading.local()
        self._over = threading.Event()
        self._errors: list[BaseException] = []

    def spawn(self, name: str, work: Callable[[], object]) -> None:
        """Add a thread, before `run`."""
        actor = self._actors[name] = _Actor(name)
        thread = threading.Thread(target=self._main, args=(actor, work), name=name, daemon=True)
        self._threads.append(thread)

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Run everybody until `work` ends. Raises what the first thread to fail raised."""

        def main() -> None:
            work()
            self._over.set()

        self.spawn(name, main)
        for thread in self._threads:
            thread.start()
        self._pass_on()
        self._over.wait()
        for actor in self._actors.values():
            actor.turn.release()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), f"{thread.name} does not end"
        for error in self._errors:
            raise error

    def wait_until(self, ready: Callable[[], Any], what: str) -> None:
        """Let others run until `ready()` holds and it is this thread's turn again."""
        actor: _Actor = self._local.actor
        actor.ready, actor.waits_for = ready, what
        self._pass_on()
        self._await_turn(actor)

    def pause(self) -> None:
        """Let others run, perhaps."""
        self.wait_until(lambda: True, "its turn")

    def _main(self, actor: _Actor, work: Callable[[], object]) -> None:
        self._local.actor = actor
        try:
            self._await_turn(actor)
            work()
        except _End:
            return
        except BaseException as error:
            self._errors.append(error)
            self._over.set()
        actor.done = True
        if not self._over.is_set():
            self._pass_on()

    def _await_turn(self, actor: _Actor) -> None:
        assert actor.turn.acquire(timeout=TIMEOUT_S), "somebody's turn does not end"
        if self._over.is_set():
            raise _End

    def _pass_on(self) -> None:
        waiting = [actor for actor in self._actors.values() if not actor.done]
        able = [actor for actor in waiting if actor.ready()]
        if able:
            self.random.choice(able).turn.release()
            return
        listed = "\n".join(f"  {actor.name} waits for {actor.waits_for}" for actor in waiting)
        self._errors.append(Deadlock(f"nobody can go on:\n{listed}"))
        self._over.set()
