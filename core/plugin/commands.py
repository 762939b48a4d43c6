"""The commands of `nodeweave` beside serving: ours, and what runs any of them. Light to import."""

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.errors import PluginError


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`nodeweave NAME ...`. `main` is "package.module:attribute", called with the words that
    follow; it returns the exit status, and may raise the errors of `core.errors`."""

    name: str
    main: str
    summary: str


COMMANDS = {
    command.name: command
    for command in (
        Command(
            name="plugins",
            main="core.plugin_list:main",
            summary="list what is installed, and what it registers",
        ),
        Command(
            name="plan",
            main="core.plan:main",
            summary="show what a plan makes of a model, without starting anything",
        ),
    )
}


def run_command(command: Command, words: Sequence[str]) -> int:
    """Import and run it. Raises PluginError where it can't be imported."""
    module, _, attribute = command.main.partition(":")
    try:
        main = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever a third party's import raises
        raise PluginError(
            f"the command {command.name!r} can't be run: {command.main} failed to import: "
            f"{type(error).__name__}: {error}"
        ) from error
    status = main(words)
    if type(status) is not int:
        raise PluginError(
            f"the command {command.name!r} returned {status!r}; {command.main} must return an "
            "integer, the exit status"
        )
    return status


def command_lines(commands: Iterable[Command]) -> str:
    """For the help of `nodeweave`."""
    lines = [f"  {command.name:<10} {command.summary}" for command in commands]
    return "\n".join(["commands:", *lines])
