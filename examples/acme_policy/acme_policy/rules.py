"""The rules of this package. Imports no torch: they are asked before anything starts."""

from collections.abc import Callable, Sequence

from acme_policy import SmallOptions
from core.plugin.hookspecs import NoOptions
from core.settings.config import AppConfig

# A sentence for each setting that is not allowed.
Rule = Callable[[AppConfig], Sequence[str]]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def anything(options: NoOptions) -> Rule:
    """The factory of the rule "anything"."""
    return lambda config: []


def small(options: SmallOptions) -> Rule:
    """The factory of the rule "small"."""

    def rule(config: AppConfig) -> Sequence[str]:
        problems = []
        if config.parallel.tp > options.most_ranks:
            problems.append(
                f"parallel.tp={config.parallel.tp} is more than {options.most_ranks} ranks "
                "(acme.rule.options.most_ranks)"
            )
        if config.frontend.host not in LOOPBACK:
            allowed = ", ".join(LOOPBACK)
            problems.append(f"frontend.host={config.frontend.host}: allowed here: {allowed}")
        return problems

    return rule
