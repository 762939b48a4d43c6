"""Communication backends over torch.distributed: `gloo` on CPU, `nccl` on CUDA."""

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
