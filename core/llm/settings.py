"""From the arguments of an `LLM` to a checked configuration, as the command line does it.

A setting becomes the word that the command line would have, so that there is one grammar and one
set of checks.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError, PlanError
from core.interfaces.launcher import Launcher, RemoteLauncher
from core.plugin.plugin_manager import PluginManager
from core.settings.catalog import Catalog
from core.settings.compose import blocklist, compose, parse_overrides
from core.settings.config import AppConfig, PluginChoice
from core.settings.habits import quoted
from core.settings.schema import did_you_mean

INSTEAD = "serve it with `python -m core.run` and ask it with an OpenAI client"


def configure(
    model: str | os.PathLike[str], settings: Mapping[str, Any]
) -> tuple[AppConfig, PluginManager, Launcher]:
    """Everything that can be found wrong before files are looked for."""
    words = [word for key, value in settings.items() for word in _words(key, value)]
    plugins = PluginManager.load(blocklist(parse_overrides(words)))
    search_paths = plugins.config_searchpath()
    models = Catalog(search_paths).groups["model"]
    overrides = parse_overrides([*_model_words(model, models), *words])
    config = compose(overrides, search_paths, plugins.sections)
    plugins.check_choices(config)
    if problems := plugins.plan_problems(config):
        raise PlanError(problems)
    plugins.require_serving(config)
    launcher = plugins.table("launcher").create(
        PluginChoice(name=config.launch.name, options=config.launch.options), config
    )
    if isinstance(launcher, RemoteLauncher) or launcher.site().nnodes > 1:
        raise ConfigError(
            f"launch={config.launch.name} with launch.nnodes={config.launch.nnodes} starts ranks "
            "on other machines, and those of an LLM run on one machine, beside the program; leave "
            f"it out, or {INSTEAD}"
        )
    return config, plugins, launcher


def _model_words(model: str | os.PathLike[str], models: Mapping[str, str]) -> list[str]:
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(f"model is {type(model).__name__}; it must be text or a path")
    name = os.fspath(model)
    if name in models and isinstance(model, str):
        return [f"model={name}"]
    if not name or not ("/" in name or name.endswith(".gguf") or Path(name).exists()):
        raise ConfigError(
            f"model={name!r}: there is no such preset, folder or file{did_you_mean(name, models)}\n"
            f"presets: {', '.join(models)}\n"
            "or a Hugging Face folder, a .gguf file, or a Hub id with its owner (owner/name)"
        )
    return ["model=custom", f"model.path={quoted(name)}"]


def _words(key: str, value: Any) -> list[str]:
    """A setting as the command line has it; a section's keys one by one."""
    if isinstance(value, Mapping):
        return [word for name, inner in value.items() for word in _words(f"{key}.{name}", inner)]
    return [f"{key}={_text(key, value)}"]


def _text(key: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        return quoted(os.fspath(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(key, item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{_text(key, item)}' for name, item in value.items())}}}"
    raise ConfigError(
        f"{key} is {type(value).__name__}; allowed: text, numbers, True, False, None, lists and "
        "dicts of these"
    )
