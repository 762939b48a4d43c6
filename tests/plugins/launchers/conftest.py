"""Configurations of one launcher test."""

from collections.abc import Callable

import pytest

from core.settings.config import AppConfig, LaunchConfig, ModelConfig

# What a launcher may read; tests set what they mean and inherit nothing.
PREFIXES = ("SLURM_", "LWS_", "JOB_COMPLETION_", "NODEWEAVE_", "POD_")


@pytest.fixture
def config_with() -> Callable[..., AppConfig]:
    """A configuration with these launch settings."""

    def make(**launch: object) -> AppConfig:
        return AppConfig(model=ModelConfig(name="m"), launch=LaunchConfig(**launch))

    return make


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
