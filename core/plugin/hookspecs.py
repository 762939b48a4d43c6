"""The plugin contract: every hook Nodeweave calls, and when. Hooks run at start-up only.

A plugin is a module (or object) with functions marked `hookimpl`. Third parties publish it
through the entry-point group `nodeweave`; `examples/` holds a complete package. Importing a
plugin must not import torch: factories are named as "package.module:attribute" and imported
when they are chosen.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from core.plugin.commands import Command

if TYPE_CHECKING:
    from core.interfaces.worker import WorkerInfo
    from core.settings.config import AppConfig

PROJECT = "nodeweave"
ENTRY_POINT_GROUP = "nodeweave"
HOOK_PREFIX = "register_"  # and the name of a family

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(slots=True, kw_only=True)
class NoOptions:
    """The config dataclass of plugins without options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """One name in one plugin family.

    `factory` is "package.module:attribute", or a callable; what it takes and returns is said by
    the hook. `config` is the dataclass of the plugin's options (`<group>.options.*`); the
    factory receives an instance of it first. `override` replaces a name registered before.
    `for_serving=False`: its results mean nothing; it may be timed, and is refused for serving.
    """

    name: str
    factory: str | Callable[..., Any]
    config: type = NoOptions
    summary: str = ""
    override: bool = False
    for_serving: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginFamily:
    """A family of plugins that a plugin adds: others register in it by the hook `register_<name>`,
    which returns `Registration`s as the hooks below do.

    A config field chooses one of it by the mark `core.settings.choice.Chooses(name)`; who made the
    family asks for it by `PluginManager.table(name)`. `factory` says in words what factories of the
    family take and return.
    """

    name: str
    factory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSection:
    """A section of the configuration that a plugin adds: `<name>.<key>=value` on the command line
    and in config files. `config` is a dataclass whose fields all have defaults; plugins read theirs
    by `core.settings.config.section`. Its marked fields choose plugins, as ours do."""

    name: str
    config: type


@hookspec
def register_comm() -> Sequence[Registration]:
    """Communication backends. Factory: (options) -> core.interfaces.comm.CommBackend."""
    raise AssertionError("a specification is never called")


@hookspec
def register_attention() -> Sequence[Registration]:
    """Attention backends. Factory: (options, AttentionSpec) ->
    core.interfaces.attention.AttentionBackend."""
    raise AssertionError("a specification is never called")


@hookspec
def register_latent_attention() -> Sequence[Registration]:
    """Backends of multi-head latent attention (MLA); chosen by the same keys as `attention`.
    Factory: (options, LatentAttentionSpec) ->
    core.interfaces.latent_attention.LatentAttentionBackend."""
    raise AssertionError("a specification is never called")


@hookspec
def register_moe_a2a() -> Sequence[Registration]:
    """What carries rows to experts and back. Factory: (options, A2ASpec) ->
    core.interfaces.moe_a2a.Dispatcher."""
    raise AssertionError("a specification is never called")


@hookspec
def register_parallel_plan() -> Sequence[Registration]:
    """Parallelism plans. Factory: (options, ParallelConfig) -> core.parallel.plan.Plan."""
    raise AssertionError("a specification is never called")


@hookspec
def register_balancer() -> Sequence[Registration]:
    """What chooses the DP rank of each request. Factory: (options, BalancerSpec) ->
    core.interfaces.balancer.Balancer."""
    raise AssertionError("a specification is never called")


@hookspec
def register_model() -> Sequence[Registration]:
    """Model families, named by the architecture in config.json ("LlamaForCausalLM").
    Factory: (options) -> core.interfaces.model.ModelFamily."""
    raise AssertionError("a specification is never called")


@hookspec
def register_frontend() -> Sequence[Registration]:
    """Frontends. Factory: (options, FrontendContext) -> an ASGI application."""
    raise AssertionError("a specification is never called")


@hookspec
def register_metrics_exporter() -> Sequence[Registration]:
    """Exporters of metrics. Factory: (options, ExporterContext) ->
    core.interfaces.metrics.ScrapeExporter, or PushExporter, or what is both."""
    raise AssertionError("a specification is never called")


@hookspec
def register_launcher() -> Sequence[Registration]:
    """Launchers: how the processes of a node are started. Factory: (options, AppConfig) ->
    core.interfaces.launcher.Launcher, or RemoteLauncher."""
    raise AssertionError("a specification is never called")


@hookspec
def register_logits_processor() -> Sequence[Registration]:
    """What requests may ask to be done to logits, by its name; nothing chooses among them. Factory:
    (options, AppConfig) -> core.interfaces.sampling.LogitsProcessorKind; its module imports no
    torch."""
    raise AssertionError("a specification is never called")


@hookspec
def register_checkpoint_format() -> Sequence[Registration]:
    """Formats in which models lie on a disk, and what makes weights up. Factory: (options) ->
    core.interfaces.checkpoint.CheckpointFormat, or WeightGenerator."""
    raise AssertionError("a specification is never called")


@hookspec
def register_tokenizer() -> Sequence[Registration]:
    """Kinds of tokenizers: what turns text into token ids and back. Factory: (options) ->
    core.interfaces.tokenizer.TokenizerKind."""
    raise AssertionError("a specification is never called")


@hookspec
def register_family() -> Sequence[PluginFamily]:
    """Families of plugins beside the ones above."""
    raise AssertionError("a specification is never called")


@hookspec
def register_config() -> Sequence[ConfigSection]:
    """Sections of the configuration beside ours."""
    raise AssertionError("a specification is never called")


@hookspec
def register_commands() -> Sequence[Command]:
    """Commands beside serving: `nodeweave NAME`."""
    raise AssertionError("a specification is never called")


@hookspec
def config_searchpath() -> Sequence[str]:
    """Where this plugin's own Hydra configs lie, e.g. "pkg://acme.conf"; searched after ours."""
    raise AssertionError("a specification is never called")


@hookspec
def check_plan(config: "AppConfig", plugins: Any) -> Sequence[str]:
    """Problems of a configuration, one sentence each, naming the key to change. All plugins'
    problems are reported together, before anything starts. Called with the composed configuration,
    where names may be "auto" and `engine.page_size` None, then with what these mean here. `plugins`
    is the core.plugin.plugin_manager.PluginManager, whose `table(family)` has the members of a
    family that a plugin made; one that needs none leaves it out."""
    raise AssertionError("a specification is never called")


@hookspec
def worker_lifespan(
    config: "AppConfig", worker: "WorkerInfo"
) -> AbstractContextManager[Any] | None:
    """What runs beside a rank: entered in each worker process once its device is open, before ranks
    join and the model is loaded, and left as the process ends. One that needs no `config` or
    `worker` leaves it out."""
    raise AssertionError("a specification is never called")


@hookspec(firstresult=True)
def default_backend(family: str, device: str, config: "AppConfig") -> str | None:
    """The name that `auto` means in a family ("attention.prefill", "attention.decode",
    "latent_attention.prefill", "latent_attention.decode", "moe_a2a.prefill", "moe_a2a.decode",
    "comm") on a device ("cpu", "cuda"), for a plan and a number of nodes as `config` says. The
    first plugin that returns a name decides; one that needs no `config` leaves it out."""
    raise AssertionError("a specification is never called")
