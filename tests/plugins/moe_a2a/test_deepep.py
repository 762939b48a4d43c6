"""The deepep plugin: the package's calls as it documents them, one buffer for both phases, and
what is refused before weights are read. The package is its test double, whose signatures are held
to the real ones."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from core.errors import ConfigError, PlanError, PluginError
from core.interfaces.comm import Comms, SoloCommunicator
from core.interfaces.moe_a2a import A2ASpec
from core.ops.row_ops import TorchRowOps
from core.parallel.plan import Plan
from core.testing.ranks import plan_comms, run_ranks
from plugins.moe_a2a import deepep
from plugins.moe_a2a._options import DeepEPOptions
from tests.contracts.a2a_backends import WithGroup
from tests.support import fake_deep_ep
from tests.support.deep_ep_signatures import of_class, read_source, signatures, table

NUM_EXPERTS, TOP_K, HIDDEN = 8, 2, 2048


def spec(comm: object, phase: str, **changed: object) -> A2ASpec:
    fields = {
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "hidden_size": HIDDEN,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "ops": TorchRowOps(),
        "max_rows": 6,
    }
    return A2ASpec(comm=comm, phase=phase, **(fields | changed))  # type: ignore[arg-type]


# Signatures.


def test_the_double_has_the_package_s_signatures() -> None:
    real, double = table()["0.1.0"], of_class(fake_deep_ep.Buffer)
    assert {"dispatch", "combine", "low_latency_dispatch", "low_latency_combine"} <= set(double)
    for name, signature in double.items():
        assert signature == real[name], name


def test_calls_for_0_1_0_are_calls_for_0_1_2() -> None:
    """Later versions added arguments; those there were kept their names, defaults and order."""
    old, new = table()["0.1.0"], table()["0.1.2"]
    for name in of_class(fake_deep_ep.Buffer):
        kept = [argument for argument in new[name] if argument in old[name]]
        assert kept == old[name], name


def test_the_table_is_that_of_the_package() -> None:
    """With NODEWEAVE_DEEP_EP_WHEEL=sgl_deep_ep-0.1.0-....whl, or where the package is installed."""
    wheel, found = os.environ.get("NODEWEAVE_DEEP_EP_WHEEL"), importlib.util.find_spec("deep_ep")
    if wheel:
        package = Path(wheel)
    elif found is not None and found.origin is not None:
        package = Path(found.origin).parents[1]
    else:
        pytest.skip("needs the package sgl-deep-ep, or its wheel")
    assert signatures(read_source(package)) in table().values()


# Refusals.


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="deep_ep is installed")
def test_without_the_package_the_extra_is_named() -> None:
    with pytest.raises(PluginError, match=r"moe_a2a.decode=deepep.*nodeweave\[deepep\].*=nccl"):
        deepep.create(DeepEPOptions(), spec(SoloCommunicator(), "decode"))


def test_without_a_gpu_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"prefill=deepep needs a CUDA device.*cpu.*prefill=nccl"):
        deepep.create(DeepEPOptions(), spec(SoloCommunicator(), "prefill"))


def test_what_the_package_says_on_import_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deep_ep.py").write_text("raise ImportError('This wheel requires CUDA 13')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    on_gpu = spec(SoloCommunicator(), "prefill", device=torch.device("cuda"))
    with pytest.raises(PluginError, match=r"can't be used here: ImportError: This wheel requires"):
        deepep.create(DeepEPOptions(), on_gpu)


class Named:
    """A communicator of four ranks that is never used."""

    rank, size = 0, 4
    group = object()


@pytest.mark.parametrize(
    ("phase", "changed", "fragment"),
    [
        ("decode", {"hidden_size": 3072}, "no kernel for the model's hidden size of 3072"),
        ("decode", {"top_k": 12}, "at most 11 experts"),
        ("decode", {"max_rows": 1025}, "a decode step can have 1025; lower engine.max_running_re"),
        ("prefill", {"hidden_size": 1000}, "multiple of 128"),
        ("prefill", {"dtype": torch.float16}, "computes in float16; set model.dtype=bfloat16"),
    ],
)
def test_sizes_are_checked_when_it_is_built(phase: str, changed: dict, fragment: str) -> None:
    library = fake_deep_ep.module()
    with pytest.raises(ConfigError, match=fragment):
        deepep.build(DeepEPOptions(), spec(Named(), phase, **changed), library)
    assert not library.Buffer.made


def test_ranks_that_deepep_can_not_connect_are_refused() -> None:
    class Six(Named):
        size = 6

    with pytest.raises(PlanError, match=r"parallel\.ep=6 ranks"):
        deepep.build(DeepEPOptions(), spec(Six(), "prefill", num_experts=12), fake_deep_ep)


def test_fewer_rows_than_a_step_can_have_are_refused() -> None:
    options = DeepEPOptions(low_latency_max_rows=5)
    with pytest.raises(ConfigError, match=r"low_latency_max_rows=5, but .* 6 rows of a rank"):
        deepep.build(options, spec(Named(), "decode"), fake_deep_ep)


def test_a_communicator_without_a_group_is_refused() -> None:
    class NoGroup:
        rank, size = 0, 4

    with pytest.raises(ConfigError, match=r"comm\.ep has none; set comm\.ep=nccl"):
        deepep.build(DeepEPOptions(), spec(NoGroup(), "prefill"), fake_deep_ep)


# One buffer.


def both_phases(library: ModuleType, comms: Comms) -> tuple[object, list[Tensor]]:
    """A rank that goes prefill, decode, decode, prefill, decode; and what each step made of rows of
    ones with experts that do nothing."""
    comm = WithGroup(comms.axes["ep"])
    options = DeepEPOptions(num_sms=24)
    dispatchers = {
        "prefill": deepep.build(options, spec(comm, "prefill"), library),
        "decode": deepep.build(options, spec(comm, "decode"), library),
    }
    made_at_build = len(library.Buffer.made)
    results = []
    for phase in ("prefill", "decode", "decode", "prefill", "decode"):
        rows = comm.rank + 2
        experts_TK = torch.arange(rows)[:, None] + torch.tensor([[0, 4]])
        weights_TK = torch.full((rows, TOP_K), 0.5)
        counts = [rank + 2 for rank in range(comm.size)]
        x_TE = torch.ones(rows, HIDDEN, dtype=torch.bfloat16)
        dispatched = dispatchers[phase].dispatch(x_TE, experts_TK % 8, weights_TK, counts)
        results.append(dispatchers[phase].combine(dispatched.hidden, dispatched))
    return made_at_build, results


def test_both_phases_share_one_buffer_that_is_cleaned_between_them() -> None:
    library = fake_deep_ep.module()
    ranks = run_ranks(plan_comms(Plan(dp=2, ep=2)), lambda comms: both_phases(library, comms))
    for made_at_build, results in ranks:
        assert made_at_build > 0, "buffers belong to the time before weights are read"
        for result in results:
            assert (result == 1.0).all()
    assert len(library.Buffer.made) == 2, "one for each rank"
    for buffer in library.Buffer.made:
        assert buffer.low_latency_mode
        assert buffer.explicitly_destroy, "its destructor would wait for ranks that may be dead"
        assert buffer.num_qps_per_rank == 24
        assert buffer.cleaned == 2, "once after each prefill"
    assert library.Buffer.num_sms == 24


def test_one_phase_alone_makes_its_buffer_at_the_first_step() -> None:
    library = fake_deep_ep.module()

    def work(comms: Comms) -> int:
        comm = WithGroup(comms.axes["ep"])
        dispatcher = deepep.build(DeepEPOptions(), spec(comm, "prefill"), library)
        comm.all_reduce(torch.zeros(1))  # nobody has sent anything yet
        made = len(library.Buffer.made)
        comm.all_reduce(torch.zeros(1))
        nothing = torch.zeros(0, TOP_K)
        empty = torch.zeros(0, HIDDEN, dtype=torch.bfloat16)
        dispatched = dispatcher.dispatch(empty, nothing.long(), nothing, [0, 0])
        dispatcher.combine(dispatched.hidden, dispatched)  # nobody has rows: nothing to send
        made += len(library.Buffer.made)
        comm.all_reduce(torch.zeros(1))
        row = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
        dispatcher.dispatch(row, torch.tensor([[0, 7]]), torch.ones(1, 2), [1, 1])
        return made

    assert run_ranks(plan_comms(Plan(dp=2, ep=2)), work) == [0, 0]
    for buffer in library.Buffer.made:
        assert not buffer.low_latency_mode
        assert buffer.num_rdma_bytes == 0, "one node"


def test_queues_hold_all_rows_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row and a count, of two operations at once; 1024 is what the package assumes."""
    for rows, depth in ((508, 1024), (512, 2048), (1024, 4096)):
        monkeypatch.delenv("NVSHMEM_QP_DEPTH", raising=False)
        library = fake_deep_ep.module()

        def work(comms: Comms, rows: int = rows, library: ModuleType = library) -> None:
            comm = WithGroup(comms.axes["ep"])
            dispatcher = deepep.build(DeepEPOptions(), spec(comm, "decode", max_rows=rows), library)
            dispatcher._shared._made()

        run_ranks(plan_comms(Plan(dp=2, ep=2)), work)
        assert os.environ["NVSHMEM_QP_DEPTH"] == str(depth)
    monkeypatch.delenv("NVSHMEM_QP_DEPTH")
