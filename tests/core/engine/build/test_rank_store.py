"""The store of ranks on several nodes: torch's own as the oracle, real gloo ranks, strangers."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import (
    DistNetworkError,
    DistStoreError,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from core.engine.build.rank_store import RankStore, StoreHub
from core.errors import ResourceError
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan

ROOT = Path(__file__).parents[4]
KEY = secrets.token_hex(32)
PLAN = Plan(tp_attn=3, tp_expert=3)

# Each rank sums over groups of two kinds, and says who else could reach the store's port.
RANK = """
import os, socket, sys
import torch, torch.distributed as dist
from core.settings.config import AppConfig, ModelConfig
from core.engine.build.ranks import join_ranks
from core.interfaces.control import Endpoints
from core.parallel.mesh import _stay_on_loopback
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
torch.set_num_threads(1)
_stay_on_loopback()
rank, where, key = int(sys.argv[1]), sys.argv[2], sys.argv[3]
config = AppConfig(model=ModelConfig(name="none"))
config.comm.tp.name = config.comm.ep.name = "gloo"
comms = join_ranks(config, Plan(dp=2, tp_attn=2, ep=4), rank, PluginManager.load([]),
                   Endpoints(engine="", lockstep="", steps=[], store=where, key=key),
                   torch.device("cpu"))
sums = [int(comms.axes[axis].all_reduce(torch.tensor([10 ** rank]))) for axis in ("tp", "dp", "ep")]
with socket.socket() as other:
    other.settimeout(5)
    elsewhere = other.connect_ex(("127.0.0.2", int(where.rpartition(":")[2]))) == 0
print(sums, elsewhere)
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture
def endpoint() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def hub(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreHub]:
    monkeypatch.setattr("core.engine.build.rank_store.CLOSING_S", 0.02)
    hub = StoreHub(endpoint, KEY)
    yield hub
    hub.close()


@pytest.fixture
def store(hub: StoreHub, endpoint: str) -> Iterator[RankStore]:
    store = RankStore(endpoint, KEY, "rank 0")
    store.set_timeout(timedelta(seconds=60))
    yield store
    store.close()


def play(store: Store) -> list[object]:
    """What a store answers to everything that can be asked of it. Called through C++."""
    store = PrefixStore("outer", PrefixStore("inner", store))
    seen: list[object] = []
    store.set("text", "héllo")
    store.set("bytes", bytes(range(256)))
    seen += [store.get("text"), store.get("bytes")]
    seen += [store.add("count", 5), store.add("count", -2), store.get("count")]
    seen += [store.check(["text", "count"]), store.check(["text", "no"]), store.check([])]
    seen += [store.compare_set("new", "", "first"), store.compare_set("new", "other", "second")]
    seen += [store.compare_set("new", "first", "third"), store.get("new")]
    seen += [store.compare_set("absent", "expected", "x"), store.check(["absent"])]
    seen += [store.num_keys(), store.delete_key("text"), store.delete_key("text")]
    seen += [store.check(["text"]), store.num_keys()]
    store.wait(["bytes", "new"])
    store.set("large", b"x" * 3_000_000)
    return [*seen, store.get("large")]


def test_it_answers_as_torchs_own_does(store: RankStore) -> None:
    assert play(store) == play(HashStore())


def test_a_key_is_waited_for_while_others_use_the_store(store: RankStore) -> None:
    """Also where one that is written in Python is called from threads: each has its own socket."""
    wrapped = PrefixStore("group", store)
    with ThreadPoolExecutor(8) as threads:
        waits = [threads.submit(wrapped.get, f"key {index}") for index in range(6)]
        for index in range(6):
            assert wrapped.add("calls", 1) == index + 1
            assert not any(wait.done() for wait in waits[index:])
            wrapped.set(f"key {index}", str(index))
            assert waits[index].result(60) == str(index).encode()


def test_keys_that_nobody_sets_are_named(store: RankStore) -> None:
    store.set("here", "")
    with pytest.raises(DistStoreError, match=r"not set within 0\.05 s by any rank: gone, lost$"):
        store.wait(["gone", "here", "lost"], timedelta(seconds=0.05))
    assert store.add("after", 1) == 1, "an answer to another question was taken for this one's"


def test_an_answer_that_comes_too_late_is_dropped(
    store: RankStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.engine.build.rank_store.GRACE_S", -0.2)
    with pytest.raises(DistNetworkError, match="rank 0 did not answer at tcp://127"):
        store.wait(["late"], timedelta(seconds=0.25))
    store.set("late", "1")
    for index in range(3):
        assert store.add("count", 1) == index + 1


def test_nothing_is_there_where_rank_0_is_silent(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.engine.build.rank_store.CHECK_S", 0.05)
    store = RankStore(endpoint, KEY, "rank 1")
    assert not PrefixStore("group", store).check(["stop"])
    store.close()


def test_groups_of_ranks_that_meet_at_one_address_only(endpoint: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), endpoint, KEY],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in (3, 2, 1, 0)
    ]
    answers = [process.communicate(timeout=120)[0].decode().strip() for process in processes][::-1]
    assert answers == [
        "[11, 101, 1111] False",
        "[11, 1010, 1111] False",
        "[1100, 101, 1111] False",
        "[1100, 1010, 1111] False",
    ]


def test_strangers_neither_read_nor_change_nor_stay(store: RankStore, endpoint: str) -> None:
    """One with torch's own client, one with another run's key, and ones that send anything."""
    store.set("secret", "value")
    port = int(endpoint.rpartition(":")[2])
    with pytest.raises(RuntimeError):
        TCPStore("127.0.0.1", port, None, False, timedelta(seconds=0.5), wait_for_workers=False)
    other = RankStore(endpoint, secrets.token_hex(32), "rank 0")
    other.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(DistNetworkError, match="did not answer"):
        other.set("secret", "changed")
    for payload in (b"\xff" * 4096, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(payload)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):
                    pass
    assert store.get("secret") == b"value"
    assert store.num_keys() == 1
    other.close()


def test_missing_ranks_are_named_in_bounded_time(store: RankStore) -> None:
    with pytest.raises(ResourceError, match=r"rank 0 waited 0\.3 s.*missing: rank 1, 2 of 3"):
        open_mesh(PLAN, 0, torch_backends={"tp": "gloo"}, rendezvous=store, timeout_s=0.3)


def test_a_first_rank_that_is_not_there_is_named(endpoint: str) -> None:
    store = RankStore(endpoint, KEY, "rank 1")
    with pytest.raises(
        ResourceError, match=f"rank 1 can't meet .* 0.3 s: rank 0 did not answer at {endpoint}"
    ):
        open_mesh(PLAN, 1, torch_backends={"tp": "gloo"}, rendezvous=store, timeout_s=0.3)
    store.close()


def test_a_taken_address_is_named(hub: StoreHub, endpoint: str) -> None:
    with pytest.raises(ResourceError, match=f"can't listen at {endpoint}.*in use"):
        StoreHub(endpoint, KEY)
