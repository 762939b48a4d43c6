"""What plugins add beside registrations: families, config sections and commands."""

from dataclasses import asdict, dataclass, field
from typing import Annotated

import msgspec
import pytest

from core.cluster.nodes.facts import config_facts
from core.errors import ConfigError, PluginError
from core.plugin.commands import Command, run_command
from core.plugin.hookspecs import (
    ConfigSection,
    PluginFamily,
    Registration,
    hookimpl,
)
from core.plugin.plugin_manager import PluginManager
from core.run import main
from core.settings.choice import Chooses
from core.settings.compose import compose, parse_overrides, to_yaml
from core.settings.config import AppConfig, PluginChoice, section


@dataclass(slots=True, kw_only=True)
class CacheConfig:
    gib: int = 4
    store: Annotated[PluginChoice, Chooses("store")] = field(
        default_factory=lambda: PluginChoice(name="memory")
    )

    def __post_init__(self) -> None:
        if self.gib < 1:
            raise ValueError(f"gib={self.gib}; at least 1")


class Acme:
    """A family, the section that chooses of it, and a command."""

    @hookimpl
    def register_family(self):
        return [PluginFamily(name="store", factory="(options) -> acme.Store")]

    @hookimpl
    def register_config(self):
        return [ConfigSection(name="acme", config=CacheConfig)]

    @hookimpl
    def register_commands(self):
        return [Command(name="acme", main=f"{__name__}:command", summary="say hello")]


@dataclass(slots=True, kw_only=True)
class DiskOptions:
    folder: str = "/tmp"


class Stores:
    """Another plugin, which registers in that family."""

    @hookimpl
    def register_store(self):
        return [
            Registration(name="memory", factory=lambda options: options),
            Registration(name="disk", factory=lambda options: options, config=DiskOptions),
        ]


def command(words):
    print("hello", *words)
    return 7


def loaded(**more) -> PluginManager:
    # The one that registers comes first: the order of loading does not matter.
    return PluginManager.load(objects={"stores": Stores(), "acme": Acme(), **more})


def config_of(*words, plugins=None) -> AppConfig:
    sections = (plugins or loaded()).sections
    return compose(parse_overrides(["model=smollm2", *words]), (), sections)


def test_others_register_in_a_plugins_family_and_its_section_chooses_of_it():
    plugins = loaded()
    config = config_of("acme.store.name=disk", "acme.store.options.folder=/cache")
    plugins.check_choices(config)
    chosen = section(config, "acme", CacheConfig)
    assert chosen.gib == 4
    assert plugins.table("store").create(chosen.store) == DiskOptions(folder="/cache")
    (stores,) = [plugin for plugin in plugins.loaded() if plugin.name == "stores"]
    assert stores.hooks == ("register_store",)
    assert [each.registration.name for each in stores.registered] == ["memory", "disk"]


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["acme.gib=x"], ["acme.gib='x'", "an integer"]),
        (["acme.gb=1"], ["unknown key 'acme.gb'; did you mean 'gib'?", "gib, store"]),
        (["acme.gib=0"], ["acme: gib=0; at least 1"]),
        (["acme=3"], ["acme=3", "a section"]),
        (["acm.gib=1"], ["did you mean 'acme'?", "plugins, acme"]),
        (["gib=1"], ["did you mean acme.gib?"]),
        (["sections.acme.gib=1"], ["no config group or section 'sections'"]),
    ],
)
def test_mistakes_in_a_plugins_section_are_answered_as_ours_are(words, fragments):
    with pytest.raises(ConfigError) as caught:
        config_of(*words)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["acme.store.name=disc"], ["no store plugin 'disc'; did you mean 'disk'?", "memory"]),
        (
            ["acme.store.name=disk", "acme.store.options.path=x"],
            ["acme.store.options.path", "folder"],
        ),
    ],
)
def test_choices_of_a_plugins_section_are_checked(words, fragments):
    with pytest.raises(ConfigError) as caught:
        loaded().check_choices(config_of(*words))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_plugins_section_is_shown_compared_and_passed_on_with_the_rest():
    config = config_of("acme.gib=8")
    assert "\nacme:\n  gib: 8\n" in to_yaml(config)
    assert "sections" not in to_yaml(config)
    assert config_facts(config)["config acme.gib"] == "8"
    passed = msgspec.json.decode(msgspec.json.encode(config), type=AppConfig)
    assert section(passed, "acme", CacheConfig) == CacheConfig(gib=8)
    assert asdict(passed) == asdict(config)


def test_a_section_can_stand_in_a_config_file(tmp_path):
    (tmp_path / "role").mkdir()
    role = tmp_path / "role/big.yaml"
    role.write_text("# @package _global_\nacme:\n  gib: 64\n")
    words = parse_overrides(["model=smollm2", "role=big"])
    places = [f"file://{tmp_path}"]
    assert section(compose(words, places, loaded().sections), "acme", CacheConfig).gib == 64
    with pytest.raises(ConfigError, match="unknown key 'acme'"):
        compose(words, places)


def made(hook, *results):
    return type("Plugin", (), {hook: staticmethod(hookimpl(lambda: list(results)))})()


@pytest.mark.parametrize(
    ("hook", "result", "message"),
    [
        ("register_family", PluginFamily(name="comm", factory=""), "comm"),
        ("register_family", PluginFamily(name="store", factory=""), "store"),
        ("register_family", PluginFamily(name="no-name", factory=""), "no-name"),
        ("register_config", ConfigSection(name="engine", config=CacheConfig), "engine"),
        ("register_config", ConfigSection(name="sections", config=CacheConfig), "sections"),
        ("register_config", ConfigSection(name="acme", config=CacheConfig), "acme"),
        ("register_config", ConfigSection(name="b", config=PluginFamily), "defaults"),
        ("register_config", ConfigSection(name="b", config=int), "defaults"),
        ("register_config", ConfigSection(name="a.b", config=CacheConfig), "a.b"),
        ("register_commands", Command(name="acme", main="m:f", summary=""), "acme"),
        ("register_commands", Command(name="a=b", main="m:f", summary=""), "a=b"),
    ],
)
def test_what_can_not_be_added_is_refused_with_the_plugins_name(hook, result, message):
    with pytest.raises(PluginError) as caught:
        loaded(other=made(hook, result))
    assert "'other'" in str(caught.value)
    assert message in str(caught.value)


def test_a_hook_of_a_family_that_is_not_there_is_unknown():
    with pytest.raises(PluginError, match="unknown hook 'register_store'"):
        PluginManager.load(builtins=(), objects={"stores": Stores()})


def test_what_the_program_fills_in_is_no_key_of_a_config_file(tmp_path):
    (tmp_path / "role").mkdir()
    (tmp_path / "role/odd.yaml").write_text(
        "# @package _global_\nsections:\n  acme:\n    gib: 64\n"
    )
    words = parse_overrides(["model=smollm2", "role=odd"])
    with pytest.raises(ConfigError, match="unknown key 'sections'"):
        compose(words, [f"file://{tmp_path}"], loaded().sections)


def nothing(words):
    return None


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("nothing", "returned None"), ("missing", "failed to import: AttributeError")],
)
def test_a_command_that_breaks_its_contract_is_named(attribute, message):
    with pytest.raises(PluginError, match="the command 'acme'") as caught:
        run_command(Command(name="acme", main=f"{__name__}:{attribute}", summary=""), [])
    assert message in str(caught.value)


def test_a_command_runs_without_the_plugins_it_blocks(monkeypatch):
    blocked = []

    words = ["acme", "plugins.blocklist=[broken]"]
    plugins = PluginManager.__new__(PluginManager)
    plugins.commands = {"acme": Command(name="acme", main=f"{__name__}:command", summary="")}
    monkeypatch.setattr(
        PluginManager, "load", lambda names=(): blocked.append(list(names)) or plugins
    )
    assert main(words) == 7
    assert blocked == [["broken"]]
