"""Registers the attention backend "triton", the default on NVIDIA GPUs.

Knows nothing of how it computes: plugins.attention._triton_heads.backend does, and
plugins.attention._triton_latent.backend for latent attention. Imports no Triton.
"""

import os
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
            name="triton",
            factory="plugins.attention._triton_heads.backend:build",
            summary="paged prefill and split-KV decode as Triton kernels",
        )
    ]


@hookimpl
def register_latent_attention() -> Sequence[Registration]:
    return [
        Registration(
            name="triton",
            factory="plugins.attention._triton_latent.backend:build",
            summary="split-KV decode over latents and expanded prefill as Triton kernels",
        )
    ]


@hookimpl
def default_backend(family: str, device: str) -> str | None:
    if device == "cuda" and family in _FAMILIES:
        return "triton"
    return None


@hookimpl
def check_plan(config: AppConfig) -> Sequence[str]:
    if config.engine.device != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        return []
    choices = (
        ("attention.prefill", config.attention.prefill),
        ("attention.decode", config.attention.decode),
    )
    return [
        f"{key}=triton needs a GPU but engine.device=cpu; set {key}=auto, or engine.device=cuda"
        for key, choice in choices
        if choice.name == "triton"
    ]
