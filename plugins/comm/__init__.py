"""Communication backends: `gloo` on CPU and `nccl` on CUDA, and `emulated` without any peers."""

from collections.abc import Sequence

from core.config import AppConfig
from core.hookspecs import Registration, hookimpl


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
            name="emulated",
            factory="plugins.comm.emulated:EmulatedBackend",
            summary="one rank without its peers, for timing: local copies of the right size",
            for_serving=False,
        ),
    ]


@hookimpl
def default_backend(family: str, device: str) -> str | None:
    """What `comm.<axis>=auto` means on a device."""
    if family != "comm":
        return None
    return {"cpu": "gloo", "cuda": "nccl"}.get(device)


@hookimpl
def check_plan(config: AppConfig) -> Sequence[str]:
    """NCCL has no CPU tensors."""
    if config.engine.device != "cpu":
        return []
    return [
        f"{key}=nccl needs engine.device=cuda, but it is 'cpu'; set {key}=gloo or {key}=auto"
        for key, choice in (("comm.tp", config.comm.tp), ("comm.ep", config.comm.ep))
        if choice.name == "nccl"
    ]
