"""The plugin: rules of a site that every start keeps. It adds a family (rules, to which other
plugins may add), a section of the configuration that chooses one, and a command that lists them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from core.plugin.commands import Command
from core.plugin.hookspecs import ConfigSection, PluginFamily, Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.settings.choice import Chooses, PluginChoice
from core.settings.config import AppConfig, section


@dataclass(slots=True, kw_only=True)
class AcmeConfig:
    """acme.*"""

    contact: str = "your administrator"  # whom a refusal tells to ask
    rule: Annotated[PluginChoice, Chooses("acme_rule")] = field(
        default_factory=lambda: PluginChoice(name="anything")
    )


@dataclass(slots=True, kw_only=True)
class SmallOptions:
    """acme.rule.options of the rule "small"."""

    most_ranks: int = 8  # parallel.tp

    def __post_init__(self) -> None:
        if self.most_ranks < 1:
            raise ValueError(f"most_ranks={self.most_ranks} is out of range; allowed: at least 1")


@hookimpl
def register_family() -> Sequence[PluginFamily]:
    """From now on any plugin may implement `register_acme_rule`."""
    return [PluginFamily(name="acme_rule", factory="(options) -> acme_policy.rules.Rule")]


@hookimpl
def register_acme_rule() -> Sequence[Registration]:
    """The rules that are always there."""
    return [
        Registration(
            name="anything", factory="acme_policy.rules:anything", summary="all is allowed"
        ),
        Registration(
            name="small",
            factory="acme_policy.rules:small",
            config=SmallOptions,
            summary="no more ranks than most_ranks, and nobody else's network",
        ),
    ]


@hookimpl
def register_config() -> Sequence[ConfigSection]:
    """`acme.contact=...` and `acme.rule.name=...` from now on."""
    return [ConfigSection(name="acme", config=AcmeConfig)]


@hookimpl
def register_commands() -> Sequence[Command]:
    """`nodeweave rules`."""
    return [Command(name="rules", main="acme_policy.command:main", summary="list the site's rules")]


@hookimpl
def check_plan(config: AppConfig, plugins: PluginManager) -> Sequence[str]:
    """What the chosen rule finds wrong, before anything starts."""
    own = section(config, "acme", AcmeConfig)
    rule = plugins.table("acme_rule").create(own.rule)
    return [f"{problem}; ask {own.contact}" for problem in rule(config)]
