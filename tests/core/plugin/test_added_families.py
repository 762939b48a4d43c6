"""What a plugin adds beside our families: families, sections of the configuration, commands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import pytest

from core.cluster.nodes.facts import config_facts
from core.errors import ConfigError, PluginError
from core.plugin.commands import COMMANDS, Command
from core.plugin.families import choices
from core.plugin.hookspecs import ConfigSection, PluginFamily, Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.run import main
from core.settings.choice import Chooses, PluginChoice, choice_fields, single_groups, spread_groups
from core.settings.compose import compose, parse_overrides, to_yaml
from core.settings.config import AppConfig, section


@dataclass(slots=True, kw_only=True)
class AcmeConfig:
    """acme.*"""

    limit: int = 3
    stemmer: Annotated[PluginChoice, Chooses("acme_stemmer")] = field(
        default_factory=lambda: PluginChoice(name="plain")
    )


@dataclass(slots=True, kw_only=True)
class SuffixOptions:
    suffix: str = "s"


class Acme:
    """Makes a family, and a section whose key chooses one of it."""

    @hookimpl
    def register_family(self):
        return [PluginFamily(name="acme_stemmer", factory="(options) -> text to its stem")]

    @hookimpl
    def register_config(self):
        return [ConfigSection(name="acme", config=AcmeConfig)]

    @hookimpl
    def register_commands(self):
        return [Command(name="stem", main=f"{__name__}:stem_command", summary="stems words")]


class Stemmers:
    """Another plugin, with two of that family."""

    @hookimpl
    def register_acme_stemmer(self):
        return [
            Registration(name="plain", factory=lambda options: str.strip),
            Registration(name="suffix", factory=make_suffix, config=SuffixOptions),
        ]


def make_suffix(options: SuffixOptions) -> Callable[[str], str]:
    return lambda word: word.removesuffix(options.suffix)


def stem_command(words: list[str]) -> int:
    print("stem of", *words)
    return 7


def load(**plugins: Any) -> PluginManager:
    return PluginManager.load(objects=plugins)


def composed(manager: PluginManager, *words: str) -> AppConfig:
    return compose(parse_overrides(["model=smollm2", *words]), (), manager.sections)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_family_a_section_and_a_choice_of_it(order):
    manager = load(**{name: {"a": Acme(), "b": Stemmers()}[name] for name in order})
    words = ("acme.limit=5", "acme.stemmer.name=suffix", "acme.stemmer.options.suffix=ing")
    config = composed(manager, *words)
    manager.check_choices(config)
    own = section(config, "acme", AcmeConfig)
    assert (own.limit, own.stemmer.name) == (5, "suffix")
    assert manager.table("acme_stemmer").create(own.stemmer)("running") == "runn"
    chosen = choices(config, manager.sections)
    assert (("acme_stemmer",), "acme.stemmer", own.stemmer, "acme.stemmer.options", True) in chosen
    loaded = {plugin.name: plugin for plugin in manager.loaded()}
    assert [each.family for each in loaded["b"].registered] == ["acme_stemmer"] * 2


def test_the_owner_of_a_family_asks_its_members_in_check_plan():
    class Owner(Acme):
        @hookimpl
        def check_plan(self, config, plugins):
            stem = plugins.table("acme_stemmer").create(section(config, "acme", AcmeConfig).stemmer)
            return [stem("plans")]

    manager = load(a=Owner(), b=Stemmers())
    assert manager.check_plan(composed(manager, "acme.stemmer.name=suffix")) == ["plan"]
    assert manager.check_plan(composed(manager)) == ["plans"]


def test_a_section_reaches_workers_other_nodes_and_the_shown_yaml():
    manager = load(a=Acme(), b=Stemmers())
    config = composed(manager, "acme.limit=5")
    arrived = msgspec.json.decode(msgspec.json.encode(config), type=AppConfig)
    assert section(arrived, "acme", AcmeConfig).limit == 5
    assert config_facts(config)["config acme.limit"] == "5"
    assert config_facts(composed(manager))["config acme.limit"] == "3"
    assert "\nacme:\n  limit: 5\n" in to_yaml(config)


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["acme.limt=5"], ["unknown key 'acme.limt'", "'limit'"]),
        (["acme.limit=many"], ["acme.limit='many'", "an integer"]),
        (["acne.limit=5"], ["no config group or section 'acne'", "did you mean 'acme'"]),
        (["sections.acme.limit=5"], ["no config group or section 'sections'"]),
        (["acme.stemmer.name=porter"], ["no acme_stemmer plugin 'porter'", "plain, suffix"]),
        (
            ["acme.stemmer.name=suffix", "acme.stemmer.options.sufix=x"],
            ["unknown key 'acme.stemmer.options.sufix'", "'suffix'"],
        ),
    ],
)
def test_mistakes_are_refused_as_ours_are(words, fragments):
    manager = load(a=Acme(), b=Stemmers())
    with pytest.raises((ConfigError, PluginError)) as caught:
        manager.check_choices(composed(manager, *words))
    for fragment in fragments:
        assert fragment in str(caught.value)


def plugin(**hooks: Any) -> object:
    return type("Plugin", (), {name: staticmethod(hookimpl(f)) for name, f in hooks.items()})()


@dataclass(slots=True, kw_only=True)
class Needy:
    needed: int


@pytest.mark.parametrize(
    ("broken", "fragments"),
    [
        (
            plugin(register_family=lambda: [PluginFamily(name="comm", factory="")]),
            ["'broken'", "family 'comm'", "'nodeweave' has already"],
        ),
        (
            plugin(register_config=lambda: [ConfigSection(name="engine", config=AcmeConfig)]),
            ["'broken'", "config section 'engine'", "plugins.blocklist=[broken]"],
        ),
        (
            plugin(register_config=lambda: [ConfigSection(name="needy", config=Needy)]),
            ["'broken'", "'needy'", "needy.needed is not set"],
        ),
        (
            plugin(register_commands=lambda: [Command(name="plan", main="x:y", summary="")]),
            ["'broken'", "command 'plan'"],
        ),
        (plugin(register_family=lambda: 1 / 0), ["'broken'", "register_family", "division"]),
        (
            plugin(register_acme_stemer=lambda: []),
            ["unknown hook 'register_acme_stemer'", "did you mean"],
        ),
        (
            plugin(register_acme_stemmer=lambda needs: []),
            ["'acme'", "family 'acme_stemmer'", "needs"],
        ),
    ],
)
def test_broken_additions_are_refused_with_the_plugin_s_name(broken, fragments):
    with pytest.raises(PluginError) as caught:
        load(broken=broken, acme=Acme())
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_commands(monkeypatch, capsys):
    manager = load(a=Acme())
    monkeypatch.setattr(PluginManager, "load", lambda *_, **__: manager)
    assert main(["stem", "words", "--here"]) == 7
    assert capsys.readouterr().out == "stem of words --here\n"
    assert main(["plan", "--help"]) == 0
    assert "core.plan" in capsys.readouterr().out
    assert main(["stm"]) == 2
    assert "commands: plugins, plan, stem" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "  stem       stems words\n" in capsys.readouterr().out


def test_our_commands_are_there():
    for name, command in COMMANDS.items():
        assert main([name, "--help"]) == 0, command.main


# Adding a key of ours that chooses a plugin: the marked field is all that the code needs.


@dataclass(slots=True, kw_only=True)
class DraftConfig:
    name: Annotated[str, Chooses("drafter")] = "none"
    tokens: int = 4
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class TierConfig:
    host: Annotated[PluginChoice, Chooses("kv_tier")] = field(default_factory=PluginChoice)
    disk: Annotated[PluginChoice, Chooses("kv_tier")] = field(default_factory=PluginChoice)


@dataclass(slots=True, kw_only=True)
class GrownConfig:
    draft: DraftConfig = field(default_factory=DraftConfig)
    kv_tiers: TierConfig = field(default_factory=TierConfig)


def test_a_marked_field_is_all_that_a_choice_needs():
    config = GrownConfig(draft=DraftConfig(name="ngram", options={"longest": 3}))
    found = {each.key: (each.families, each.of(config)) for each in choice_fields(GrownConfig)}
    assert found == {
        "draft": (("drafter",), PluginChoice(name="ngram", options={"longest": 3})),
        "kv_tiers.host": (("kv_tier",), PluginChoice()),
        "kv_tiers.disk": (("kv_tier",), PluginChoice()),
    }
    assert spread_groups(GrownConfig) == {"kv_tiers": ["host", "disk"]}
    assert single_groups(GrownConfig) == ["draft"]
