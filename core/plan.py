"""The command `python -m core.plan`: show what a plan makes of a model, without starting anything.

Takes the settings that `core.run` takes. Prints tables for a person, or JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from core.errors import ConfigError, NodeweaveError
from core.settings.habits import Program, correction, is_ours

if TYPE_CHECKING:
    from core.interfaces.control import ModelFiles
    from core.plan_report import PlanReport
    from core.plugin.plugin_manager import PluginManager
    from core.settings.config import AppConfig, ModelConfig

DEFAULT_BASE_PORT = 20000
PROGRAM = Program(
    "python -m core.plan",
    ("--help", "-h", "--json"),
    ("--nodes", "--base-port", "--config-dir", "-cd"),
)
HELP = """\
usage: python -m core.plan +model=NAME [group=NAME ...] [key=value ...] [flags]

Show which rank is where, what it holds, and the ports of a run over several nodes. Reads no
weights and starts nothing. Weights are counted as GPUs keep them; engine.device=cpu counts what
CPUs keep: fp8 weights are dequantised there, GGUF's 4- and 8-bit ones kept or not as
model.quantized_weights says.

examples:
  python -m core.plan +model=deepseek_v3 parallel=tp16_ep16 --nodes 2
  python -m core.plan +model=llama31_405b parallel=tp32 --json

flags:
  --nodes N              nodes that the ranks are spread over (default: launch.nnodes)
  --base-port PORT       port of node 0 that all others are counted from (default: that of
                         launch.dist_init_addr, else 20000)
  --json                 one JSON object instead of tables
  --config-dir FOLDER    look for configs of your own there too
  --help
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A report and what stands beside it."""

    model: str
    files: str | None  # the folder of a model that is on this machine
    report: "PlanReport"
    ports: list[dict[str, Any]]  # of a run over several nodes: name, port, node, clients
    ports_text: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: the configuration is wrong)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        flags = _parse_flags(words)
        if flags.help:
            print(HELP, end="")
            return 0
        planned = _plan(flags)
    except NodeweaveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(_to_json(planned) if flags.json else to_text(planned))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the flags")


def _parse_flags(words: list[str]) -> argparse.Namespace:
    if not is_ours(words, PROGRAM):
        from core.settings.catalog import Catalog

        if not {"-h", "--help"} & set(words):
            raise ConfigError(correction(words, Catalog([]).groups, PROGRAM))
        words = ["--help"]
    parser = _Parser(prog="core.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--base-port", type=int)
    parser.add_argument("--config-dir", "-cd")
    return parser.parse_intermixed_args(words)


def _plan(flags: argparse.Namespace) -> Planned:
    from core.plugin.plugin_manager import PluginManager
    from core.settings.compose import blocklist, compose, parse_overrides

    overrides = parse_overrides(flags.words)
    plugins = PluginManager.load(blocklist(overrides))
    search_paths = plugins.config_searchpath()
    if flags.config_dir is not None:
        search_paths.append(f"file://{Path(flags.config_dir).expanduser().absolute()}")
    config = compose(overrides, search_paths, plugins.sections)
    plugins.check_choices(config)
    return plan_of(config, plugins, num_nodes=flags.nodes, base_port=flags.base_port)


def plan_of(
    config: "AppConfig",
    plugins: "PluginManager",
    *,
    num_nodes: int | None = None,
    base_port: int | None = None,
) -> Planned:
    """What a configuration makes of its model. Raises PlanError, which lists every problem."""
    import torch

    from core.cluster.nodes.ports import Ports, listeners, table
    from core.devices.native_dtypes import native_dtypes
    from core.engine.build.context import dtype_of
    from core.plan_report import plan_report
    from core.resolve import find_family, resolve
    from core.settings.address import split_address

    num_nodes = num_nodes or config.launch.nnodes
    config = replace(config, launch=replace(config.launch, nnodes=num_nodes))
    device = "cuda" if config.engine.device == "auto" else config.engine.device
    files = _files(config.model, plugins)
    resolved = resolve(config, plugins, files, device, native_dtypes())
    family, spec = find_family(config, plugins, files)
    keeps = resolved.config.model.quantized_weights == "keep"
    report = plan_report(
        family,
        spec,
        resolved.plan,
        dtype=dtype_of(resolved.config),
        device=torch.device(device),
        num_nodes=num_nodes,
        group_bits=files.group_bits if keeps else None,
    )
    found: list[dict[str, Any]] = []
    text = ""
    if num_nodes > 1:
        if base_port is None and config.launch.dist_init_addr is not None:
            base_port = split_address(config.launch.dist_init_addr)[1]
        ports = Ports(base_port or DEFAULT_BASE_PORT, resolved.plan.dp)
        found = [
            {"name": each.name, "port": each.port, "node": each.node, "clients": each.clients}
            for each in listeners(ports, resolved.plan, num_nodes)
        ]
        text = table(ports, resolved.plan, num_nodes)
    folder = str(Path(files.weight_files[0]).parent) if files.weight_files else None
    return Planned(
        model=config.model.name, files=folder, report=report, ports=found, ports_text=text
    )


def _files(model: "ModelConfig", plugins: "PluginManager") -> "ModelFiles":
    """The model's files, whose headers say how weights are stored; a tokenizer is not needed. Where
    the configuration holds the config.json, nothing is fetched for it; a random checkpoint is
    written, so that its folder can be named."""
    from core.interfaces.control import ModelFiles
    from core.sources.files import find_files
    from core.sources.package import is_fetched

    is_here = model.package is not None and is_fetched(model.package)
    if model.shape is None or model.random_checkpoint is not None or is_here:
        return find_files(model, plugins, lambda task, done, total, unit: None)
    return ModelFiles(
        hf_config=dict(model.shape),
        weight_files=[],
        weight_format="dummy",
        tokenizer_dir="",
        eos_ids=[],
        default_sampling={},
    )


def _to_json(planned: Planned) -> str:
    import msgspec

    values = msgspec.to_builtins(planned)
    del values["ports_text"]
    return msgspec.json.format(msgspec.json.encode(values), indent=2).decode()


def to_text(planned: Planned) -> str:
    """The report as a person reads it."""
    report, plan = planned.report, planned.report.plan
    nodes = "1 node" if report.num_nodes == 1 else f"{report.num_nodes} nodes"
    lines = [
        f"{planned.model} ({report.architecture}), {report.num_parameters / 1e9:.2f}B parameters "
        f"({report.num_parameters:,})",
        f"{plan.world_size} ranks on {nodes}: attention dp {plan.dp} x tp {plan.tp_attn}, experts "
        f"ep {plan.ep} x tp {plan.tp_expert}, dense MLPs over {plan.axis_size('dense')}, "
        f"{plan.redundant_experts} redundant experts",
        f"weights: {_gb(report.weight_bytes)} over all ranks, as {report.device} keeps them; "
        f"{_held(report)}",
        f"cache: {report.kv_token_bytes:,} bytes a token in {report.dtype}, on each of the "
        f"{plan.tp_attn} ranks of its attention group",
    ]
    if planned.files is not None:
        lines.append(f"files: {planned.files}")
    lines += ["", "ranks", *_rank_lines(report), "", "tensors", *_tensor_lines(report)]
    if planned.ports_text:
        lines += ["", "ports", planned.ports_text]
    return "\n".join(lines)


def _held(report: "PlanReport") -> str:
    if report.num_distinct == report.num_parameters:
        return "every parameter is held by at least one rank"
    return f"{report.num_parameters - report.num_distinct:,} parameters are held by NO rank"


def _rank_lines(report: "PlanReport") -> list[str]:
    axes = ("pp", "dp", "tp", "ep", "tp_expert")
    rows: list[tuple[str, ...]] = [("rank", "node", *axes, "experts a layer", "weights")]
    for rank in report.ranks:
        places = [str(rank.coordinates[axis]) for axis in axes]
        experts = str(rank.num_experts or "-")
        rows.append((str(rank.rank), str(rank.node), *places, experts, _gb(rank.weight_bytes)))
    return _aligned(rows)


def _tensor_lines(report: "PlanReport") -> list[str]:
    rows = [("name", "tensors", "shape", "parts", "shape of a part", "ranks with a part", "dtype")]
    for tensor in report.tensors:
        rows.append(
            (
                tensor.name,
                str(tensor.num_tensors),
                _shape(tensor.shape),
                str(tensor.num_parts),
                _shape(tensor.part_shape),
                str(tensor.num_copies),
                tensor.dtype,
            )
        )
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; what looks like a number is set to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in columns]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
