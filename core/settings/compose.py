"""From command-line words to an AppConfig: the only place where Hydra objects become dataclasses.

Hydra composes files and overrides into plain values; unknown keys and types are judged by
`core.settings.schema`, so that every mistake is reported in one way. Knows nothing of what plugins
do.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError
from core.settings.address import split_address
from core.settings.catalog import OWN_CONFIGS, Catalog
from core.settings.choice import single_groups, spread_groups
from core.settings.config import (
    MAKE_A_TOKEN,
    TOKEN_VARIABLE,
    AppConfig,
    plain_values,
)
from core.settings.habits import key_of_flag, setting
from core.settings.schema import build, convert, defaults, did_you_mean, is_settable, knobs

SPREAD_GROUPS = spread_groups(AppConfig)
DEFAULTED_GROUPS = single_groups(AppConfig)  # in config.yaml's defaults, as themselves
HYDRA_VERSION_BASE = "1.3"
COMPLETION_COMMANDS = r"(install|uninstall|query)=(bash|zsh|fish)"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
API_KEY_VARIABLE = "NODEWEAVE_API_KEY"
# Text that names a file or folder, in which ~ is the user's home.
PATH_KEYS = (
    "model.path",
    "engine.kernel_cache_dir",
    "frontend.api_key_file",
    "frontend.access_log_file",
    "cluster.token_file",
    "parallel.eplb.load_file",
)
STATIC_LAUNCHER = "static"  # the one that can't find node 0 by itself


class NoModelError(ConfigError):
    """No model was chosen; the command line answers with the list of models."""


@dataclass(frozen=True, slots=True)
class Override:
    """One word of the command line: `key=text`, where `package` is what follows an @."""

    key: str
    package: str | None
    text: str  # as written after the =
    value: Any

    @property
    def target(self) -> str:
        return f"{self.key}@{self.package}" if self.package else self.key


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Read key=value words in Hydra's grammar. A leading + or ++ is accepted and not needed."""
    parser = OverridesParser.create()
    found: dict[str, Override] = {}
    for word in words:
        name, _, text = word.partition("=")
        if text.startswith("~"):  # a home, for which Hydra's grammar has no place without quotes
            text = f'"{text}"'
        try:
            (parsed,) = parser.parse_overrides([f"{name}={text}" if text else word])
        except OverrideParseException as error:
            if "=" not in word:
                raise ConfigError(
                    f"{word!r} is not a setting; write key=value, for example +model=smollm2"
                ) from error
            raise ConfigError(_unreadable(word, str(error).splitlines()[0])) from error
        key = parsed.key_or_group
        if not key:
            raise ConfigError(f"{word!r} sets nothing: write key=value, for example +model=smollm2")
        if parsed.is_delete():
            raise ConfigError(f"{word!r}: keys can't be removed; set another value instead")
        if parsed.is_sweep_override():
            raise ConfigError(
                f"{word!r} is a sweep over several values, and one process serves one "
                f"configuration; write a list as {key}=[a,b], text with commas in quotes"
            )
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            raise ConfigError(
                f"{word!r}: Hydra's own settings have no effect here; "
                "a folder with configs of your own is added by --config-dir FOLDER"
            )
        override = Override(key, parsed.package, text, parsed.value())
        earlier = found.get(override.target)
        if earlier is not None and earlier.value != override.value:
            raise ConfigError(
                f"{override.target} is given twice, with different values: "
                f"{earlier.text} and {override.text}"
            )
        found[override.target] = override
    return list(found.values())


def _unreadable(word: str, reason: str) -> str:
    """What to say of a word that Hydra's grammar does not know."""
    name, _, text = word.partition("=")
    if re.fullmatch(r"\+{0,2}[\w.@/-]+", name, re.ASCII) is None:
        return f"can't read {word!r}: {name!r} is no key: those are letters, digits, _ and dots"
    return (
        f"can't read {word!r}: {reason}\n"
        "where the value is text, put it in quotes, and these in quotes for the shell:\n"
        f"  {setting(name, text)}"
    )


def blocklist(overrides: Sequence[Override]) -> list[str]:
    """plugins.blocklist as given on the command line. It is needed before plugins are loaded,
    and they before configs are composed, so it can't come from a config file."""
    for override in overrides:
        if override.key == "plugins.blocklist":
            if not isinstance(override.value, list):
                raise ConfigError(
                    f"plugins.blocklist={override.text}: expected a list, "
                    f"plugins.blocklist=[{override.text}]"
                )
            return [str(name) for name in override.value]
    return []


def compose(
    overrides: Sequence[Override],
    search_paths: Sequence[str] = (),
    sections: Mapping[str, type] = MappingProxyType({}),
) -> AppConfig:
    """The resolved configuration. Raises ConfigError for everything a user can get wrong.

    `search_paths` are places of further configs ("pkg://acme.conf", "file:///folder"), `sections`
    the dataclasses of plugins' own sections.
    """
    catalog = Catalog(search_paths)
    words = _hydra_words(overrides, catalog, search_paths, sections)
    values = _compose_values(words)
    _require_sections(values, sections)
    if values["plugins"]["blocklist"] != blocklist(overrides):
        raise ConfigError("plugins.blocklist can be set on the command line only, not in a file")
    _expand_homes(values)
    model = values["model"]
    if not any(override.key == "model" for override in overrides) and "name" not in model:
        raise NoModelError("no model was chosen")
    if model.get("name") is None:
        if not model.get("path"):
            raise ConfigError("model.path is not set; +model=custom needs model.path=FOLDER")
        model["name"] = re.sub(r"\.gguf$", "", Path(str(model["path"])).name)
    values["sections"] = {
        name: _checked(cls, values.pop(name, {}), name) for name, cls in sections.items()
    }
    config = build(AppConfig, values)
    problems = contradictions(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _require_sections(values: Mapping[str, Any], added: Mapping[str, type]) -> None:
    """Raise ConfigError for a section of a config file that is neither ours nor a plugin's."""
    known = _section_names(added)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown key {name!r}{did_you_mean(name, known)}\n"
                f"keys of the configuration: {', '.join(known)}"
            )


def _checked(cls: type[Any], values: Any, name: str) -> dict[str, Any]:
    """A plugin's section as plain values, defaults included."""
    return asdict(convert(cls, values, name))


def _expand_homes(values: dict[str, Any]) -> None:
    """Replace a leading ~ or ~user in paths."""
    for key in PATH_KEYS:
        *sections, last = key.split(".")
        section: Any = values
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(last), str):
            section[last] = os.path.expanduser(section[last])


def contradictions(config: AppConfig) -> list[str]:
    """Settings that can't hold together, whatever plugins are used; one sentence each."""
    problems = []
    model, frontend = config.model, config.frontend
    sources = {
        "model.path": model.path,
        "model.package": model.package and model.package.name,
        "model.random_checkpoint": model.random_checkpoint
        and f"seed {model.random_checkpoint.seed}",
    }
    given = [f"{key}={value}" for key, value in sources.items() if value is not None]
    if len(given) > 1:
        problems.append(
            f"{' and '.join(given)} are both set; to serve other files than the preset's: "
            f"+model=custom model.path={model.path or 'FOLDER'}"
        )
    if not given:
        if model.load_format == "auto":
            problems.append("model.path is not set; set it to a folder, a .gguf file or a Hub id")
        elif model.shape is None:
            problems.append(
                f"model.load_format={model.load_format} needs a model.shape or a model.path"
            )
    problems += _node_problems(config)
    open_to_all = frontend.api_key_file is None and not os.environ.get(API_KEY_VARIABLE)
    if frontend.host not in LOOPBACK and open_to_all and not frontend.allow_anonymous:
        problems.append(
            f"frontend.host={frontend.host} would serve anyone who reaches it; set "
            f"frontend.api_key_file=FILE or the environment variable {API_KEY_VARIABLE}, "
            "or frontend.allow_anonymous=true"
        )
    return problems


def _node_problems(config: AppConfig) -> list[str]:
    """What several nodes lack to meet."""
    launch, problems = config.launch, []
    if launch.dist_init_addr is not None:
        try:
            split_address(launch.dist_init_addr)
        except ConfigError as error:
            problems.append(str(error))
    if launch.nnodes == 1:
        return problems
    if launch.name == STATIC_LAUNCHER and launch.dist_init_addr is None:
        problems.append(
            f"launch.nnodes={launch.nnodes} needs launch.dist_init_addr=HOST:PORT of node 0"
        )
    if config.cluster.token_file is None and not os.environ.get(TOKEN_VARIABLE):
        problems.append(
            f"launch.nnodes={launch.nnodes} needs a cluster token, by which nodes know each other; "
            f"{MAKE_A_TOKEN}"
        )
    return problems


def to_yaml(config: AppConfig) -> str:
    """The whole configuration as YAML, every default included."""
    return OmegaConf.to_yaml(OmegaConf.create(plain_values(config)))


def complete(
    arguments: Sequence[str],
    search_paths: Sequence[str],
    sections: Mapping[str, type] = MappingProxyType({}),
) -> None:
    """Let Hydra install or answer shell completion (bash, zsh, fish) for `nodeweave`.

    Hydra knows programs by the last part of argv[0] and reads the line typed from the
    environment; the line is rewritten into words it can compose.
    """
    if len(arguments) != 1 or not re.fullmatch(COMPLETION_COMMANDS, arguments[0]):
        raise ConfigError(
            f"-sc {' '.join(arguments)}: expected install=bash or uninstall=bash (or zsh, fish)"
        )
    _store_defaults()
    line = os.environ.get("COMP_LINE", "")
    typed = re.sub(r"^\s*(\S*python\S*\s+-m\s+core\.run|\S+)\s*", "", line)
    *done, current = typed.split(" ") if typed else [""]
    try:
        overrides = parse_overrides([word for word in done if word])
        words = _hydra_words(overrides, Catalog(search_paths), search_paths, sections)
    except ConfigError:  # completing after a mistake: offer what there would be without it
        words = _searchpath_words(search_paths)
    os.environ["COMP_LINE"] = " ".join(["nodeweave", *words, current])
    sys.argv = ["nodeweave", "--shell-completion", *arguments]
    answer = hydra.main(
        config_path=OWN_CONFIGS, config_name="config", version_base=HYDRA_VERSION_BASE
    )
    answer(_never_run)()


def _never_run(_: Any) -> None:
    raise AssertionError("completion runs no job")


def _hydra_words(
    overrides: Sequence[Override],
    catalog: Catalog,
    search_paths: Sequence[str],
    sections: Mapping[str, type] = MappingProxyType({}),
) -> list[str]:
    """What Hydra is given: groups with + where config.yaml has no default for them, shorthands
    spread out, and values with ++ so that an unknown key reaches our own check."""
    words = _searchpath_words(search_paths)
    targets = {override.target for override in overrides}
    for override in overrides:
        key, package = override.key, override.package
        if key not in catalog.groups:
            if package is not None:
                raise ConfigError(_unknown(key, catalog, sections))
            if key.partition(".")[0] not in _section_names(sections):
                raise ConfigError(_unknown(key, catalog, sections))
            words.append(f"++{key}={override.text}")
            continue
        if not isinstance(override.value, str):
            raise ConfigError(
                f"{override.target}={override.text}: expected the name of a {key} config: "
                f"{', '.join(catalog.groups[key])}"
            )
        catalog.require_option(key, override.value)
        if key in SPREAD_GROUPS:
            words += _spread(override, targets)
        else:
            sign = "" if key in DEFAULTED_GROUPS and package is None else "+"
            words.append(f"{sign}{override.target}={override.text}")
    return words


def _spread(override: Override, targets: set[str]) -> list[str]:
    """`attention=X` for every phase that has no choice of its own; `attention@...=X` as it is."""
    key = override.key
    packages = [f"{key}.{member}" for member in SPREAD_GROUPS[key]]
    if override.package is None:
        open_targets = [f"{key}@{package}" for package in packages]
        return [f"{target}={override.text}" for target in open_targets if target not in targets]
    if override.package not in packages:
        raise ConfigError(
            f"{override.target}: there is no such place{did_you_mean(override.package, packages)}\n"
            f"write {key}={override.text}, or one of: "
            + ", ".join(f"{key}@{package}={override.text}" for package in packages)
        )
    return [f"{override.target}={override.text}"]


def _searchpath_words(search_paths: Sequence[str]) -> list[str]:
    return [f"hydra.searchpath=[{','.join(search_paths)}]"] if search_paths else []


def _section_names(added: Mapping[str, type]) -> list[str]:
    return [*(field.name for field in fields(AppConfig) if is_settable(field)), *added]


def _unknown(key: str, catalog: Catalog, added: Mapping[str, type]) -> str:
    sections = _section_names(added)
    known = sorted({*sections, *catalog.groups})
    first = key.partition(".")[0]
    elsewhere = key_of_flag(key)
    full = [elsewhere] if elsewhere else []
    keys = [*knobs(AppConfig), *(knob for name, cls in added.items() for knob in knobs(cls, name))]
    full += [knob.key for knob in keys if knob.key.endswith(f".{key}")]
    hint = f"; did you mean {' or '.join(dict.fromkeys(full))}?" if full else ""
    return (
        f"{key}: there is no config group or section {first!r}"
        f"{hint or did_you_mean(first, known)}\n"
        f"groups: {', '.join(sorted(catalog.groups))}\n"
        f"sections: {', '.join(sections)}"
    )


def _compose_values(words: list[str]) -> dict[str, Any]:
    """Nested plain values as Hydra composes them, interpolations resolved."""
    _store_defaults()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("conf", version_base=HYDRA_VERSION_BASE):
            composed = hydra.compose("config", overrides=words)
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        cause = error.__cause__
        detail = f"\n{cause}" if isinstance(cause, OmegaConfBaseException) else ""
        raise ConfigError(f"the configuration can't be composed: {error}{detail}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _store_defaults() -> None:
    ConfigStore.instance().store(name="nodeweave_defaults", node=defaults(AppConfig))
