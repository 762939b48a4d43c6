"""The dispatchers that the moe_a2a contract holds for, and how each is built in a test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from core.interfaces.comm import Communicator
from core.interfaces.moe_a2a import A2ASpec, Dispatcher
from core.plugin.hookspecs import NoOptions
from core.testing.moe_a2a import CPU, Case, spec_of
from plugins.moe_a2a import deepep, nccl
from plugins.moe_a2a._options import AllGatherOptions, DeepEPOptions, NcclOptions
from plugins.moe_a2a.allgather import AllGatherDispatcher
from plugins.moe_a2a.local import LocalDispatcher
from tests.support import fake_deep_ep


def any_case(case: Case) -> bool:
    return True


def bfloat16_only(case: Case) -> bool:
    return case.dtype == torch.bfloat16


@dataclass(frozen=True)
class Parameters:
    """How a dispatcher is built, and for which sizes of the ep axis and which cases."""

    make: Callable[[Any, A2ASpec], Dispatcher]
    options: Any
    sizes: tuple[int, ...] = (1, 2, 4)
    phase: str = "prefill"
    hidden_size: int = 48
    can: Callable[[Case], bool] = any_case
    fp8: bool = False  # rows travel as float8 where the spec allows it


def fake_deepep(options: DeepEPOptions, spec: A2ASpec) -> Dispatcher:
    return deepep.build(options, spec, fake_deep_ep)


BACKENDS = {
    "local": Parameters(LocalDispatcher, NoOptions(), sizes=(1,)),
    "allgather": Parameters(AllGatherDispatcher, AllGatherOptions()),
    "allgather-contiguous": Parameters(AllGatherDispatcher, AllGatherOptions(layout="contiguous")),
    "allgather-batched": Parameters(AllGatherDispatcher, AllGatherOptions(layout="batched")),
    "nccl": Parameters(nccl.create, NcclOptions(exchange="counted"), fp8=True),
    "nccl-plain": Parameters(nccl.create, NcclOptions(exchange="counted", fp8=False)),
    "nccl-fixed": Parameters(nccl.create, NcclOptions(exchange="fixed"), fp8=True),
    "nccl-fixed-plain": Parameters(nccl.create, NcclOptions(exchange="fixed", fp8=False)),
    "deepep-normal": Parameters(
        fake_deepep, DeepEPOptions(), sizes=(2, 4), hidden_size=256, can=bfloat16_only, fp8=True
    ),
    "deepep-low-latency": Parameters(
        fake_deepep,
        DeepEPOptions(),
        sizes=(2, 4),
        phase="decode",
        hidden_size=2048,
        can=bfloat16_only,
        fp8=True,
    ),
}


class WithGroup:
    """A communicator of threads with the attribute that DeepEP takes its ranks from."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.group = fake_deep_ep.FakeGroup(comm)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def build(name: str, case: Case, comm: Communicator, device: torch.device = CPU) -> Dispatcher:
    """The dispatcher of this rank."""
    parameters = BACKENDS[name]
    spec = spec_of(case, comm, parameters.phase, parameters.hidden_size, device)
    return parameters.make(parameters.options, spec)
