"""The plugin: what it registers, where its configs lie, and what it can't do. Importing it does not
import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plugin.hookspecs import Registration, hookimpl
from core.settings.config import AppConfig

TRANSPORTS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(slots=True, kw_only=True)
class AcmeOptions:
    """comm.<axis>.options of this backend."""

    transport: str = "gloo"  # what carries the parts: "gloo" for CPUs, "nccl" for GPUs

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS.values():
            raise ValueError(f"transport={self.transport!r} is unknown; allowed: gloo, nccl")


@hookimpl
def register_comm() -> Sequence[Registration]:
    """One backend, for any axis."""
    return [
        Registration(
            name="acme",
            factory="acme_comm.backend:AcmeBackend",
            config=AcmeOptions,
            summary="sums in the order of ranks, in float32: the same bits on any number of GPUs",
        )
    ]


@hookimpl
def config_searchpath() -> Sequence[str]:
    """Holds comm/acme.yaml."""
    return ["pkg://acme_comm.conf"]


@hookimpl
def check_plan(config: AppConfig) -> Sequence[str]:
    """The transport must be that of the device; `engine.device` is known on the second call."""
    needed = TRANSPORTS.get(config.engine.device)
    return [
        f"comm.{axis}.options.transport={transport} can't carry tensors of "
        f"engine.device={config.engine.device}; set comm.{axis}.options.transport={needed}"
        for axis, choice in (("tp", config.comm.tp), ("ep", config.comm.ep))
        if choice.name == "acme"
        and needed is not None
        and (transport := choice.options.get("transport", "gloo")) != needed
    ]
