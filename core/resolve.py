"""From a configuration and a model's files to a plan that fits, before any process starts.

Imports no torch: the launcher stays light. Replaces every `auto` by what it means here, so that
workers (and, on several nodes, the comparison between nodes) see settled values only.
"""

import dataclasses
from dataclasses import dataclass

from core.config import AppConfig, PluginChoice
from core.errors import PlanError
from core.interfaces.control import ModelFiles
from core.interfaces.model import ModelFamily, ModelSpec
from core.parallel.plan import Plan
from core.plugin_manager import PluginManager


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What is going to run. `config` holds no `auto` for device and backends."""

    config: AppConfig
    plan: Plan
    spec: ModelSpec
    files: ModelFiles
    max_model_len: int


def resolve(config: AppConfig, plugins: PluginManager, files: ModelFiles, device: str) -> Resolved:
    """Settle the configuration against a model, on a machine that computes on `device` ("cpu" or
    "cuda"). Raises PluginError, or PlanError, which lists every problem there is."""
    config = settle_backends(config, plugins, device)
    family, spec = find_family(config, plugins, files)
    plan: Plan = plugins.table("parallel_plan").create(
        PluginChoice(name=config.parallel.plan, options=config.parallel.options), config.parallel
    )
    problems = [*family.plan_problems(spec, plan.tp_attn), *plugins.check_plan(config)]
    max_model_len = config.model.max_model_len or spec.max_position_embeddings
    if max_model_len > spec.max_position_embeddings:
        problems.append(
            f"model.max_model_len={max_model_len} is more than the {spec.max_position_embeddings} "
            f"tokens that {config.model.name} was trained for; lower model.max_model_len"
        )
    if problems:
        raise PlanError(problems)
    return Resolved(config=config, plan=plan, spec=spec, files=files, max_model_len=max_model_len)


def settle_backends(config: AppConfig, plugins: PluginManager, device: str) -> AppConfig:
    """Replace `auto` for the device and for every plugin chosen by phase or axis."""

    def settle(family: str, choice: PluginChoice) -> PluginChoice:
        if choice.name != "auto":
            return choice
        return dataclasses.replace(choice, name=plugins.default_backend(family, device))

    return dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, device=device),
        comm=dataclasses.replace(config.comm, tp=settle("comm", config.comm.tp)),
        attention=dataclasses.replace(
            config.attention,
            prefill=settle("attention.prefill", config.attention.prefill),
            decode=settle("attention.decode", config.attention.decode),
        ),
    )


def find_family(
    config: AppConfig, plugins: PluginManager, files: ModelFiles
) -> tuple[ModelFamily, ModelSpec]:
    """The model plugin for the checkpoint (or the one asked for) and the model's sizes."""
    name = config.model.family
    if name == "auto":
        name = files.hf_config["architectures"][0]
    family: ModelFamily = plugins.table("model").create(PluginChoice(name=name))
    return family, family.parse(files.hf_config)
