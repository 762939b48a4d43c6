"""What carries rows to experts, and `emulated`, which carries none. Imports no torch."""

import importlib.util
from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl
from core.settings.config import AppConfig
from plugins.moe_a2a._deepep_limits import config_problems
from plugins.moe_a2a._measured import fastest, measured_rows
from plugins.moe_a2a._options import (
    AllGatherOptions,
    DeepEPOptions,
    EmulatedOptions,
    NcclOptions,
    SymmMemOptions,
)

_SMALL_PROMPTS = 1 / 16  # of the largest step: what takes longest counts in steps with prompts


@hookimpl
def register_moe_a2a() -> Sequence[Registration]:
    """The dispatchers in this package."""
    return [
        Registration(
            name="local",
            factory="plugins.moe_a2a.local:LocalDispatcher",
            summary="rows stay where they are; sums of experts on other ranks are added up",
        ),
        Registration(
            name="allgather",
            factory="plugins.moe_a2a.allgather:AllGatherDispatcher",
            config=AllGatherOptions,
            summary="every rank gets all rows; for the ranks of one host",
        ),
        Registration(
            name="nccl",
            factory="plugins.moe_a2a.nccl:create",
            config=NcclOptions,
            summary="collectives of comm.ep, with counts or without: NCCL on GPUs, gloo on CPUs",
        ),
        Registration(
            name="symm_mem",
            factory="plugins.moe_a2a.symm_mem:create",
            config=SymmMemOptions,
            summary="GPUs of one host write rows into each other's memory; no counts",
        ),
        Registration(
            name="deepep",
            factory="plugins.moe_a2a.deepep:create",
            config=DeepEPOptions,
            summary="DeepEP's kernels over NVLink and RDMA; needs the extra deepep",
        ),
        Registration(
            name="emulated",
            factory="plugins.moe_a2a.emulated:EmulatedDispatcher",
            config=EmulatedOptions,
            summary="one rank without its peers, for timing: own rows stand in for theirs",
            for_serving=False,
        ),
    ]


@hookimpl
def default_backend(family: str, device: str, config: AppConfig) -> str | None:
    """What `moe_a2a.<phase>=auto` means on a device, where rows travel to experts: what was fastest
    for as many ranks and rows, or a rule where nothing was measured."""
    if family not in ("moe_a2a.prefill", "moe_a2a.decode"):
        return None
    if device != "cuda":
        return {"cpu": "nccl"}.get(device)
    has_deepep = importlib.util.find_spec("deep_ep") is not None
    one_host = config.launch.nnodes == 1
    measured = _measured_backend(family, config, one_host=one_host, has_deepep=has_deepep)
    if measured is not None:
        return measured
    if has_deepep:
        return "deepep"
    return "allgather" if one_host else "nccl"


def _measured_backend(
    family: str, config: AppConfig, *, one_host: bool, has_deepep: bool
) -> str | None:
    """The fastest of those that can carry rows here, over the steps of a phase; None where nobody
    measured."""
    names = {"allgather", "nccl"} | ({"symm_mem"} if one_host else set())
    if has_deepep:
        names.add("deepep")
    parallel, engine = config.parallel, config.engine
    most, share = engine.running_limit, 0.0
    if family == "moe_a2a.prefill":
        most, share = most + engine.max_prefill_tokens, _SMALL_PROMPTS
    most = -(-most // (parallel.tp // parallel.dp_attention))  # ranks share a DP rank's rows
    shape = config.model.shape or {}
    return fastest(
        measured_rows(),
        ranks=parallel.ep,
        one_host=one_host,
        least_rows=int(share * most),
        most_rows=most,
        hidden_size=shape.get("hidden_size"),
        names=names,
    )


@hookimpl
def check_plan(config: AppConfig) -> Sequence[str]:
    """Dispatchers that don't fit the plan or the machine."""
    problems = []
    for phase in ("prefill", "decode"):
        choice = config.moe_a2a.prefill if phase == "prefill" else config.moe_a2a.decode
        if choice.name == "local" and config.parallel.ep > 1:
            problems += _local_problems(config, phase)
        if choice.name == "symm_mem":
            problems += _symm_mem_problems(config, phase)
        if choice.name == "deepep":
            problems += config_problems(config, phase)
    return problems


def _symm_mem_problems(config: AppConfig, phase: str) -> list[str]:
    """Why GPUs can't write into each other's memory."""
    if config.engine.device == "cpu":
        return [
            f"moe_a2a.{phase}=symm_mem needs engine.device=cuda, but it is 'cpu'; set "
            f"moe_a2a.{phase}=auto"
        ]
    if config.launch.nnodes > 1:
        return [
            f"moe_a2a.{phase}=symm_mem connects the GPUs of one host, but launch.nnodes="
            f"{config.launch.nnodes}; set moe_a2a.{phase}=deepep or moe_a2a.{phase}=auto"
        ]
    return []


def _local_problems(config: AppConfig, phase: str) -> list[str]:
    """Why rows can't stay where they are, though experts are spread over ranks."""
    parallel, a2a = config.parallel, config.moe_a2a
    if parallel.dp_attention > 1:
        return [
            f"moe_a2a.{phase}=local carries rows to no other rank, but with "
            f"parallel.dp_attention={parallel.dp_attention} and parallel.ep={parallel.ep} ranks "
            f"have rows and experts of their own; set moe_a2a.{phase}=auto"
        ]
    other, name = (
        ("decode", a2a.decode.name) if phase == "prefill" else ("prefill", a2a.prefill.name)
    )
    if name in ("local", "auto"):
        return []
    return [
        f"moe_a2a.{phase}=local leaves all rows on every rank and moe_a2a.{other}={name} shares "
        f"them out, but weights are cut for one of both; set moe_a2a=local or moe_a2a={name}"
    ]
