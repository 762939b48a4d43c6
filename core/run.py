"""The command line: compose the configuration, check it against the plugins, start.

Knows the flags and what they print; how a configuration is made is `core.settings.compose`, how it
is served `core.start`. Modules are imported where they are used: `--version` needs none of them,
and Ctrl-C is quiet from the first moment on.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from core.cluster.processes.log_stream import print_error, steady_output
from core.errors import ConfigError, NodeweaveError, PlanError
from core.plugin.commands import COMMANDS, Command, command_lines, run_command
from core.settings.habits import correction, is_ours

if TYPE_CHECKING:
    from core.settings.catalog import Catalog

HELP = """\
usage: nodeweave +model=NAME [group=NAME ...] [key=value ...]
       nodeweave COMMAND ...
       (or: python -m core.run ...)

Serve a large language model over HTTP. A group chooses one of its configs, a key sets one value;
every key with its default and unit is in docs/configuration.md, and --cfg job prints them all.

{groups}

{commands}

examples:
  nodeweave +model=smollm2                                  a small model, on CPU or GPU
  nodeweave +model=custom model.path=/models/my-llama       a Hugging Face folder
  nodeweave +model=llama31_8b parallel=tp2 frontend.port=8000
  nodeweave +model=smollm2 attention=torch_ref              both phases with one backend
  nodeweave +model=smollm2 attention@attention.decode=cpu   one phase only
  nodeweave +model=deepseek_v3 parallel=tp16_ep16 launch.nnodes=2 launch.node_rank=0 \\
      launch.dist_init_addr=10.0.0.1:20000                  the first of two nodes

flags:
  --cfg job              print the resolved configuration as YAML and exit
  --config-dir FOLDER    look for configs of your own there too (FOLDER/model/mine.yaml)
  -sc install=bash       print the shell completion of `nodeweave` for bash (also zsh, fish):
                         eval "$(nodeweave -sc install=bash)"
  --version, --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: the configuration is wrong)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except NodeweaveError as error:
        print_error(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # `| head` has read enough; the interpreter flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from core.disk.cache import cache_root
        from core.disk.disk_room import explained

        told = explained(error, cache_root())
        if not isinstance(told, NodeweaveError):
            raise
        print_error(f"error: {told}")
        return told.exit_code
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    commands = _commands(words) if words else COMMANDS
    if words and words[0] in commands:
        return run_command(commands[words[0]], words[1:])
    if not is_ours(words):
        if not {"-h", "--help"} & set(words):
            hint = f"\ncommands: {', '.join(commands)}" if words[0].isidentifier() else ""
            raise ConfigError(correction(words, _catalog([]).groups) + hint)
        words = ["--help"]  # who asks for help is not told what is wrong
    flags = _parse_flags(words)
    if flags.version:
        print(f"nodeweave {_version()}")
        return 0
    from core.interfaces.launcher import RemoteLauncher
    from core.plugin.plugin_manager import PluginManager
    from core.settings.compose import (
        NoModelError,
        blocklist,
        complete,
        compose,
        parse_overrides,
        to_yaml,
    )
    from core.settings.config import PluginChoice

    completing = flags.shell_completion
    overrides = [] if completing else parse_overrides(flags.words)
    plugins = PluginManager.load(blocklist(overrides))
    search_paths = plugins.config_searchpath()
    if flags.config_dir is not None:
        search_paths.append(f"file://{Path(os.path.expanduser(flags.config_dir)).absolute()}")
    if completing:
        complete(flags.words, search_paths, plugins.sections)
        return 0
    if flags.help:
        groups = _group_lines(_catalog(search_paths))
        listed = command_lines([*COMMANDS.values(), *plugins.commands.values()])
        print(HELP.format(groups=groups, commands=listed), end="", flush=True)
        return 0
    try:
        config = compose(overrides, search_paths, plugins.sections)
    except NoModelError as error:
        raise ConfigError(_no_model(_catalog(search_paths))) from error
    plugins.check_choices(config)
    problems = plugins.plan_problems(config)
    if problems:
        raise PlanError(problems)
    if flags.cfg is not None:
        print(to_yaml(config), end="", flush=True)
        return 0
    plugins.require_serving(config)
    launcher = plugins.table("launcher").create(
        PluginChoice(name=config.launch.name, options=config.launch.options), config
    )
    if isinstance(launcher, RemoteLauncher):
        with steady_output():
            return launcher.drive(words)
    from core.start import start

    return start(config, plugins, launcher)


def _commands(words: list[str]) -> Mapping[str, Command]:
    """Those that the first word may be one of: plugins are loaded only where it may be theirs, and
    without those that a later word blocks."""
    if words[0] in COMMANDS or not words[0].isidentifier():
        return COMMANDS
    from core.plugin.plugin_manager import PluginManager
    from core.settings.compose import blocklist, parse_overrides

    blocking = [word for word in words[1:] if word.startswith("plugins.blocklist=")]
    return {**COMMANDS, **PluginManager.load(blocklist(parse_overrides(blocking))).commands}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the flags")


def _parse_flags(words: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="nodeweave", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    flags = parser.parse_intermixed_args(words)
    if flags.multirun:
        raise ConfigError(
            "-m/--multirun is Hydra's way to run many jobs, and one process serves one "
            "configuration; leave it out (the -m of `python -m core.run` stands before core.run; "
            "a model's file is served by +model=custom model.path=FILE)"
        )
    return flags


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("nodeweave")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _catalog(search_paths: Sequence[str]) -> "Catalog":
    from core.settings.catalog import Catalog

    return Catalog(search_paths)


def _group_lines(catalog: "Catalog") -> str:
    lines = ["groups:"]
    for group, options in catalog.groups.items():
        lines.append(f"  {group:<10} {', '.join(options)}")
    return "\n".join(lines)


def _no_model(catalog: "Catalog") -> str:
    lines = ["no model was chosen; add one with +model=NAME:"]
    models = catalog.groups["model"]
    width = max(map(len, models))
    lines += [f"  {name:<{width}}  {summary}" for name, summary in models.items()]
    lines.append("\nfor example:\n  python -m core.run +model=smollm2")
    lines.append("  python -m core.run +model=custom model.path=/folder/with/config.json")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
