"""Nodeweave's core. `LLM`, `SamplingParams` and `Completion` are loaded when they are asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.frontend.completion import Completion
    from core.interfaces.messages import SamplingParams
    from core.llm.model import LLM

__all__ = ["LLM", "Completion", "SamplingParams"]

_HOMES = {
    "LLM": "core.llm.model",
    "Completion": "core.frontend.completion",
    "SamplingParams": "core.interfaces.messages",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
