"""Registers the attention backend "cpu", the default on CPUs.

Knows nothing of how it computes: plugins.attention._cpu.heads does, and
plugins.attention._cpu.latent for latent attention.
"""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl
from core.settings.config import AppConfig

_FAMILIES = (
    "attention.prefill",
    "attention.decode",
    "latent_attention.prefill",
    "latent_attention.decode",
)


@hookimpl
def register_attention() -> Sequence[Registration]:
    return [
        Registration(
            name="cpu",
            factory="plugins.attention._cpu.heads:build",
            summary="gathers pages and calls torch's fused CPU attention",
        )
    ]


@hookimpl
def register_latent_attention() -> Sequence[Registration]:
    return [
        Registration(
            name="cpu",
            factory="plugins.attention._cpu.latent:build",
            summary="torch's fused CPU attention over latents (decode) or expanded keys",
        )
    ]


@hookimpl
def default_backend(family: str, device: str) -> str | None:
    if device == "cpu" and family in _FAMILIES:
        return "cpu"
    return None


@hookimpl
def check_plan(config: AppConfig) -> Sequence[str]:
    choices = (
        ("attention.prefill", config.attention.prefill),
        ("attention.decode", config.attention.decode),
    )
    return [
        f"{key}=cpu computes on the CPU but engine.device=cuda; set {key}=auto, or "
        "engine.device=cpu"
        for key, choice in choices
        if choice.name == "cpu" and config.engine.device == "cuda"
    ]
