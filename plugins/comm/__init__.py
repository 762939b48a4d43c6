"""Communication backends: `gloo` on CPU, `nccl` and `symm_mem` on CUDA, and `emulated` without any
peers."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl
from core.settings.config import AppConfig
from plugins.comm._options import SymmMemOptions


@hookimpl
def register_comm() -> Sequence[Registration]:
    """The backends in this package."""
    return [
        Registration(
            name="gloo",
            factory="plugins.comm.gloo:GlooBackend",
            summary="CPU tensors over sockets; CUDA tensors by way of the CPU (slow)",
        ),
        Registration(
            name="nccl",
            factory="plugins.comm.nccl:NcclBackend",
            summary="CUDA tensors over NVLink, PCIe, InfiniBand or sockets",
        ),
        Registration(
            name="symm_mem",
            factory="plugins.comm.symm_mem:SymmMemBackend",
            config=SymmMemOptions,
            summary="CUDA tensors of one host: few rows into peers' memory, the rest as nccl",
        ),
        Registration(
            name="emulated",
            factory="plugins.comm.emulated:EmulatedBackend",
            summary="one rank without its peers, for timing: local copies of the right size",
            for_serving=False,
        ),
    ]


@hookimpl
def default_backend(family: str, device: str, config: AppConfig) -> str | None:
    """What `comm.<axis>=auto` means on a device."""
    if family != "comm":
        return None
    on_gpus = "symm_mem" if config.launch.nnodes == 1 else "nccl"
    return {"cpu": "gloo", "cuda": on_gpus}.get(device)


@hookimpl
def check_plan(config: AppConfig) -> Sequence[str]:
    """NCCL has no CPU tensors, and GPUs write into each other's memory within one host."""
    chosen = [("comm.tp", config.comm.tp.name), ("comm.ep", config.comm.ep.name)]
    if config.engine.device == "cpu":
        return [
            f"{key}={name} needs engine.device=cuda, but it is 'cpu'; set {key}=gloo or {key}=auto"
            for key, name in chosen
            if name in ("nccl", "symm_mem")
        ]
    return [
        f"{key}=symm_mem connects the GPUs of one host, but launch.nnodes={config.launch.nnodes}; "
        f"set {key}=nccl or {key}=auto"
        for key, name in chosen
        if name == "symm_mem" and config.launch.nnodes > 1
    ]
