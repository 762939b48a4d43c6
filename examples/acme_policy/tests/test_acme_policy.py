"""Family, section and command of the installed package, beside another plugin with a rule."""

from collections.abc import Callable, Sequence

import pytest

from core.plugin.hookspecs import NoOptions, Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.run import main
from core.settings.compose import compose, parse_overrides
from core.settings.config import AppConfig

OPEN = ("frontend.host=0.0.0.0", "frontend.allow_anonymous=true")


class Weekend:
    """Another package, that has a rule."""

    @hookimpl
    def register_acme_rule(self) -> Sequence[Registration]:
        return [Registration(name="weekend", factory=weekend, summary="never")]


def weekend(options: NoOptions) -> Callable[[AppConfig], Sequence[str]]:
    return lambda config: ["the cluster is closed"]


def problems(*words: str) -> list[str]:
    plugins = PluginManager.load(objects={"weekend": Weekend()})
    config = compose(parse_overrides(["model=smollm2", *words]), (), plugins.sections)
    plugins.check_choices(config)
    return plugins.plan_problems(config)


def test_the_chosen_rule_is_kept() -> None:
    assert problems("parallel.tp=3") == []
    assert problems("acme.rule.name=small", "parallel.tp=3") == []
    small = ["acme.rule.name=small", "acme.rule.options.most_ranks=2", "parallel.tp=3"]
    assert problems(*small, *OPEN) == [
        "parallel.tp=3 is more than 2 ranks (acme.rule.options.most_ranks); ask your administrator",
        "frontend.host=0.0.0.0: allowed here: 127.0.0.1, ::1, localhost; ask your administrator",
    ]


def test_a_rule_of_another_package_is_chosen_by_its_name() -> None:
    found = problems("acme.rule.name=weekend", "acme.contact=ops")
    assert found == ["the cluster is closed; ask ops"]


def test_nothing_starts_against_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+model=smollm2", "acme.rule.name=small", *OPEN]) == 2
    assert "allowed here: 127.0.0.1" in capsys.readouterr().err
    assert main(["rules"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "anything     all is allowed (acme_policy)",
        "small        no more ranks than most_ranks, and nobody else's network (acme_policy)",
    ]
    assert main(["rules", "--all"]) == 2
