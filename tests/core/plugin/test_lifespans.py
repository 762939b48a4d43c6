"""What plugins run beside a rank: in which thread, in which order, and whatever they do wrong."""

import threading
from contextlib import contextmanager

import pytest

from core.errors import PluginError
from core.interfaces.worker import WorkerInfo
from core.plugin.hookspecs import hookimpl
from core.plugin.lifespans import Lifespan, Lifespans
from core.plugin.plugin_manager import PluginManager

WAIT_S = 20.0
WORKER = WorkerInfo(rank=1, world_size=2, dp_rank=0, local_ranks=2, device="cpu")


def manager_of(*hooks):
    made = {
        f"acme{i}": type("Plugin", (), {"worker_lifespan": staticmethod(hookimpl(hook))})()
        for i, hook in enumerate(hooks)
    }
    return PluginManager.load(objects=made)


def recorded(said, name, *, on_enter=lambda: None, on_exit=lambda: None):
    @contextmanager
    def lifespan():
        said.append(f"{name} enters")
        on_enter()
        try:
            yield
        except BaseException as error:
            said.append(f"{name} is told {type(error).__name__}")
            raise
        finally:
            said.append(f"{name} leaves")
            on_exit()

    return Lifespan(name, lifespan())


def raiser(error):
    def fails():
        raise error

    return fails


def test_a_plugin_gets_the_configuration_and_which_rank_it_is():
    seen = []

    @contextmanager
    def whole(config, worker):
        seen.append((config, worker))
        yield

    @contextmanager
    def short(worker):
        seen.append(worker.rank)
        yield

    manager = manager_of(whole, short, lambda: None)
    lifespans = Lifespans()
    lifespans.enter(manager.worker_lifespans("config", WORKER))
    lifespans.leave(None, WAIT_S)
    assert seen == [("config", WORKER), 1]


def test_they_are_entered_in_order_and_left_in_reverse_in_one_thread():
    said, threads = [], set()

    def remember():
        threads.add(threading.current_thread())

    found = [recorded(said, name, on_enter=remember, on_exit=remember) for name in "ab"]
    begun = []
    lifespans = Lifespans()
    lifespans.enter(found, prepare=remember, on_begin=begun.append)
    assert said == ["a enters", "b enters"]
    lifespans.leave(None, WAIT_S)
    lifespans.leave(ValueError("too late"), WAIT_S)
    assert said[2:] == ["b leaves", "a leaves"]
    assert begun == ["a", "b"]
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_they_are_told_why_the_rank_ends(caplog):
    said = []
    lifespans = Lifespans()
    lifespans.enter([recorded(said, "a"), recorded(said, "b")])
    lifespans.leave(MemoryError("no room"), WAIT_S)
    told = ["b is told MemoryError", "b leaves", "a is told MemoryError", "a leaves"]
    assert said[2:] == told
    assert not caplog.records, "raising again what one is told is no failure"


@pytest.mark.parametrize("error", [ValueError("no port"), SystemExit(3), PluginError("no port")])
def test_one_that_fails_is_named_and_those_before_it_are_left(error, caplog):
    said = []
    failing = recorded(said, "bad", on_enter=raiser(error))
    lifespans = Lifespans()
    says = rf"plugin 'bad' failed in worker_lifespan: {type(error).__name__}: .*\n.*blocklist"
    with pytest.raises(PluginError, match=says) as caught:
        lifespans.enter([recorded(said, "a"), failing, recorded(said, "never")])
    lifespans.leave(caught.value, WAIT_S)
    kind = type(error).__name__
    assert said == ["a enters", "bad enters", f"a is told {kind}", "a leaves"]
    assert "'bad' failed in worker_lifespan" in caplog.text


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (lambda: 5, "returned a int from worker_lifespan"),
        (lambda: (yield), "returned a generator from worker_lifespan.*contextlib.contextmanager"),
        (lambda config: config.nothing, "'acme0' failed in worker_lifespan: AttributeError"),
    ],
)
def test_what_is_no_context_manager_is_refused(hook, says):
    with pytest.raises(PluginError, match=says):
        manager_of(hook).worker_lifespans("config", WORKER)


def test_one_that_fails_as_it_leaves_is_told_and_the_others_leave(caplog):
    said = []
    found = [recorded(said, "a"), recorded(said, "b", on_exit=raiser(OSError("disk full")))]
    lifespans = Lifespans()
    lifespans.enter(found)
    lifespans.leave(None, WAIT_S)
    assert said[2:] == ["b leaves", "a leaves"]
    assert "plugin 'b' failed as it left worker_lifespan" in caplog.text
    assert "disk full" in caplog.text


def test_one_that_hangs_as_it_leaves_is_not_waited_for(caplog):
    said, go_on = [], threading.Event()
    lifespans = Lifespans()
    lifespans.enter([recorded(said, "stuck", on_exit=go_on.wait)])
    lifespans.leave(None, 0.01)
    assert "plugin 'stuck' is still in its worker_lifespan after 0.01 s" in caplog.text
    go_on.set()
    lifespans.leave(None, WAIT_S)


def test_one_that_hangs_as_it_enters_does_not_hold_up_the_end(caplog):
    said, entering, go_on = [], threading.Event(), threading.Event()

    def hang():
        entering.set()
        go_on.wait()

    lifespans = Lifespans()
    found = [recorded(said, "a"), recorded(said, "stuck", on_enter=hang), recorded(said, "never")]
    main = threading.Thread(target=lifespans.enter, args=(found,))
    main.start()
    assert entering.wait(WAIT_S)
    lifespans.leave(None, 0.01)
    assert "plugin 'stuck' is still in its worker_lifespan" in caplog.text
    go_on.set()
    main.join(WAIT_S)
    lifespans.leave(None, WAIT_S)
    assert said == ["a enters", "stuck enters", "stuck leaves", "a leaves"]


def test_without_any_nothing_is_started():
    lifespans = Lifespans()
    lifespans.enter([])
    assert "nodeweave-lifespans" not in {thread.name for thread in threading.enumerate()}
    lifespans.leave(None, 0.0)
