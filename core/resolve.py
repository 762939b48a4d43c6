"""From a configuration and a model's files to a plan that fits, before any process starts.

Imports no torch: the launcher stays light. Replaces every `auto`, and a page size that was not
given, by what it means here, so that workers (and, on several nodes, the comparison between nodes)
see settled values only.
"""

import dataclasses
from dataclasses import dataclass

from core.errors import ModelKeyError, PlanError
from core.interfaces.control import ModelFiles
from core.interfaces.launcher import NativeDtypes
from core.interfaces.model import ModelFamily, ModelSpec
from core.parallel.eplb import nodes_of_groups
from core.parallel.experts import expert_problems
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
from core.settings.config import DEFAULT_RUNNING_REQUESTS, AppConfig, PluginChoice
from core.settings.schema import did_you_mean

MAX_SHOWN = 60  # characters of a stranger's name in an error
PAGE_SIZE = 16
# The fast latent kernel of Hopper GPUs copies tiles of 64 tokens, each out of one page, as FlashMLA
# does; vLLM and SGLang choose 64 for such models too.
LATENT_PAGE_SIZE = 64
# On a device with so much memory the pool of most models holds twice the default.
LARGE_DEVICE_BYTES = 64 * 1024**3
LARGE_RUNNING_REQUESTS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What is going to run. `config` holds no `auto` for device, dtype and backends, and an
    integer for `engine.page_size`."""

    config: AppConfig
    plan: Plan
    spec: ModelSpec
    files: ModelFiles
    max_model_len: int
    dtype_reason: str  # why a CPU computes in this dtype; "" where nobody needs to be told


def resolve(
    config: AppConfig,
    plugins: PluginManager,
    files: ModelFiles,
    device: str,
    dtypes: NativeDtypes,
    device_bytes: int = 0,
) -> Resolved:
    """Settle the configuration against a model, on a machine that computes on `device` ("cpu" or
    "cuda", of so much memory) and whose CPU multiplies `dtypes`. Raises PluginError, PlanError,
    which lists every problem there is, or ConfigError for a KV pool of less than a page."""
    family, spec = find_family(config, plugins, files)
    plan: Plan = plugins.table("parallel_plan").create(
        PluginChoice(name=config.parallel.plan, options=config.parallel.options), config.parallel
    )
    asked_dtype = config.model.dtype
    config, dtype_reason = settle_dtype(config, spec, device, dtypes)
    config, kept = settle_quantized_weights(config, files, device, dtypes, asked_dtype)
    dtype_reason += kept
    config = settle_page_size(config, spec)
    config = settle_running_requests(config, plan, device_bytes)
    config = settle_backends(config, plugins, device, spec, plan)
    plan = dataclasses.replace(plan, replicated_rows=experts_add_up(config, plan))
    problems = [
        *expert_plan_problems(config, spec, plan),
        *family.plan_problems(spec, plan),
        *plugins.check_plan(config),
    ]
    max_model_len = config.model.max_model_len or spec.max_position_embeddings
    if max_model_len > spec.max_position_embeddings:
        problems.append(
            f"model.max_model_len={max_model_len} is more than the {spec.max_position_embeddings} "
            f"tokens that {config.model.name} was trained for; lower model.max_model_len"
        )
    if problems:
        raise PlanError(problems)
    return Resolved(
        config=config,
        plan=plan,
        spec=spec,
        files=files,
        max_model_len=max_model_len,
        dtype_reason=dtype_reason,
    )


def attention_family(spec: ModelSpec) -> str:
    """The plugin family that the model's attention backends are of."""
    return "latent_attention" if spec.latent_attention else "attention"


def settle_dtype(
    config: AppConfig, spec: ModelSpec, device: str, dtypes: NativeDtypes
) -> tuple[AppConfig, str]:
    """Replace `auto` by the checkpoint's dtype, or by float32 on a CPU that would have to convert
    every value of it; and say why, where a CPU decided."""
    if config.model.dtype != "auto":
        return config, ""
    dtype, reason = spec.dtype, ""
    if device == "cpu" and dtype in dtypes.lacking:
        reason = f"not the checkpoint's {dtype}: {dtypes.lacking[dtype]}"
        dtype = "float32"
    elif device == "cpu" and dtype in dtypes.native:
        reason = f"the checkpoint's; this CPU multiplies it ({dtypes.native[dtype]})"
    settled = dataclasses.replace(config.model, dtype=dtype)
    return dataclasses.replace(config, model=settled), reason


def settle_quantized_weights(
    config: AppConfig, files: ModelFiles, device: str, dtypes: NativeDtypes, asked_dtype: str
) -> tuple[AppConfig, str]:
    """Replace `auto`, and say what is kept. Raises PlanError where nothing can be.

    Products of kept matrices are as exact as bfloat16: whoever asks for another dtype than the
    machine's gets that."""
    choice, num_kept = config.model.quantized_weights, len(files.group_bits)
    possible = device == "cpu" and dtypes.grouped and num_kept > 0
    if choice in ("keep", "both") and not possible:
        raise PlanError(
            [
                f"model.quantized_weights={choice} needs a GGUF file with matrices in Q4_0, Q4_1, "
                "Q4_K or Q8_0, and engine.device=cpu on a CPU with AVX2; set "
                "model.quantized_weights=auto"
            ]
        )
    if choice == "auto":
        choice = "both" if possible and asked_dtype == "auto" else "dequantize"
    settled = dataclasses.replace(config.model, quantized_weights=choice)
    kept = {
        "keep": f"; {num_kept} matrices stay in 4 and 8 bits",
        "both": f"; {num_kept} matrices in 4 and 8 bits for few rows, in 16 for many",
        "dequantize": "",
    }[choice]
    return dataclasses.replace(config, model=settled), kept


def settle_page_size(config: AppConfig, spec: ModelSpec) -> AppConfig:
    """Replace None by the page size that suits the model; `EngineConfig` then checks again that
    the KV pool holds a page, and raises ConfigError."""
    if config.engine.page_size is not None:
        return config
    page_size = LATENT_PAGE_SIZE if spec.latent_attention else PAGE_SIZE
    return dataclasses.replace(
        config, engine=dataclasses.replace(config.engine, page_size=page_size)
    )


def settle_running_requests(config: AppConfig, plan: Plan, device_bytes: int) -> AppConfig:
    """Replace None by what the device holds; where ranks have requests or experts of their own, a
    step's rows are theirs together, and buffers of exchanges grow with them."""
    if config.engine.max_running_requests is not None:
        return config
    alone = plan.dp == 1 and plan.ep == 1
    large = device_bytes >= LARGE_DEVICE_BYTES
    limit = LARGE_RUNNING_REQUESTS if alone and large else DEFAULT_RUNNING_REQUESTS
    engine = dataclasses.replace(config.engine, max_running_requests=limit)
    return dataclasses.replace(config, engine=engine)


def settle_backends(
    config: AppConfig, plugins: PluginManager, device: str, spec: ModelSpec, plan: Plan
) -> AppConfig:
    """Replace `auto` for the device and for every plugin chosen by phase or axis.

    Raises PluginError for an attention backend that the model's kind of attention doesn't have.
    """

    def settle(family: str, choice: PluginChoice) -> PluginChoice:
        if choice.name != "auto":
            return choice
        return dataclasses.replace(choice, name=plugins.default_backend(family, device, config))

    def settle_attention(phase: str, choice: PluginChoice) -> PluginChoice:
        family = attention_family(spec)
        settled = settle(f"{family}.{phase}", choice)
        plugins.table(family).get(settled.name)
        return settled

    comm, attention, moe_a2a = config.comm, config.attention, config.moe_a2a
    # On one host all ranks of tensor-parallel attention have all rows already, and adding up costs
    # the all-reduce that the layer would end with anyway.
    one_host = plan.dp == 1 and config.launch.nnodes == 1
    both_free = {moe_a2a.prefill.name, moe_a2a.decode.name} <= {"auto", "local"}
    stays = plan.ep == 1 or (one_host and both_free)

    def settle_a2a(phase: str, choice: PluginChoice) -> PluginChoice:
        if choice.name == "auto" and stays:
            return dataclasses.replace(choice, name="local")
        return settle(f"moe_a2a.{phase}", choice)

    return dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, device=device),
        comm=dataclasses.replace(comm, tp=settle("comm", comm.tp), ep=settle("comm", comm.ep)),
        attention=dataclasses.replace(
            attention,
            prefill=settle_attention("prefill", attention.prefill),
            decode=settle_attention("decode", attention.decode),
        ),
        moe_a2a=dataclasses.replace(
            moe_a2a,
            prefill=settle_a2a("prefill", moe_a2a.prefill),
            decode=settle_a2a("decode", moe_a2a.decode),
        ),
    )


def experts_add_up(config: AppConfig, plan: Plan) -> bool:
    """Whether rows stay where they are though experts are spread over ranks."""
    names = {config.moe_a2a.prefill.name, config.moe_a2a.decode.name}
    return plan.ep > 1 and plan.dp == 1 and names == {"local"}


def expert_plan_problems(config: AppConfig, spec: ModelSpec, plan: Plan) -> list[str]:
    """Why the model's experts can't be spread as the plan says, one sentence each."""
    moe = spec.moe
    if moe is not None:
        problems = expert_problems(moe.num_experts, plan.ep, plan.redundant_experts)
        try:
            nodes_of_groups(
                config.parallel.eplb.strategy,
                num_experts=moe.num_experts,
                num_groups=moe.num_groups,
                ep=plan.ep,
                nodes=config.launch.nnodes,
            )
        except PlanError as error:
            problems += error.problems
        return problems
    return [
        f"{key}={value}: {config.model.name} has no experts; set {key}={neutral}"
        for key, value, neutral in (
            ("parallel.ep", plan.ep, 1),
            ("parallel.redundant_experts", plan.redundant_experts, 0),
        )
        if value != neutral
    ]


def find_family(
    config: AppConfig, plugins: PluginManager, files: ModelFiles
) -> tuple[ModelFamily, ModelSpec]:
    """The model plugin for the checkpoint (or the one asked for) and the model's sizes."""
    name = config.model.family
    if name == "auto":
        name = files.hf_config["architectures"][0]
        _require_family(name, plugins)
    family: ModelFamily = plugins.table("model").create(PluginChoice(name=name))
    try:
        spec = family.parse(files.hf_config)
        _require_stored(spec, files.num_tensors)
    except ModelKeyError as error:
        raise error.named(files.key_names) from error
    return family, spec


def _require_family(architecture: str, plugins: PluginManager) -> None:
    """Raise ModelError where no model plugin serves what the checkpoint says that it is."""
    known = sorted(plugins.table("model"))
    if architecture not in known:
        shown = architecture[:MAX_SHOWN] + "..." * (len(architecture) > MAX_SHOWN)
        raise ModelKeyError(
            "architectures",
            f"={[shown]!r} is served by no model plugin{did_you_mean(shown, known)}\n"
            f"served: {', '.join(known)}; model.family=NAME takes it for one of these, where it is "
            "computed like it",
        )


def _require_stored(spec: ModelSpec, num_tensors: int) -> None:
    """Raise ModelError where a config claims more layers or experts than there are tensors: a model
    of them would be walked for hours before its weights are missed."""
    if not num_tensors:
        return
    num_experts = 0 if spec.moe is None else spec.moe.num_experts * len(spec.moe.layers)
    if max(spec.num_layers, num_experts) > num_tensors:
        experts = f" and {num_experts} experts" if num_experts else ""
        raise ModelKeyError(
            "num_hidden_layers",
            f"={spec.num_layers}: the files hold {num_tensors} tensors, too few for "
            f"{spec.num_layers} layers{experts}; check that config and weights belong together",
        )
