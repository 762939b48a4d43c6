"""What a parent process and its children tell each other (JSON lines over inherited pipes).

Child -> parent: one `ChildStatus` a line. Parent -> child: one `ParentControl` a line; the end of
that stream means that the parent is gone, and the child ends itself.
"""

from typing import Any

import msgspec


class StartPhase(msgspec.Struct, frozen=True, tag=True):
    """A start-up phase ended ("import", "load weights", "kv pool", "warm up"...)."""

    name: str
    seconds: float


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far a long task is; sent at most some ten times a second."""

    task: str
    done: int
    total: int
    unit: str  # "B" or "tensors"


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The child serves from now on. `info` holds plain values for the summary."""

    info: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The child ends because of an error: `kind` is its class in core.errors, or "internal".

    `blames`: processes ("worker 1"), the end of any of which explains it: messages to them or
    collectives with them failed.
    """

    kind: str
    message: str
    blames: list[str] = []


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """A worker lives; sent some times a second once it is ready. The supervisor finds one that
    says nothing (stopped), or that gets nowhere while `finished` is behind `launched`."""

    launched: int  # steps started since the start
    finished: int  # of them done
    pieces: int = 0  # of steps that are done: layers, parts of prompt logprobs
    cpu_s: float = 0.0  # CPU time of the thread that computes; 0: another device does
    expected_s: float = 0.0  # that the step under way should take in all; 0: not known


class LinesDropped(msgspec.Struct, frozen=True, tag=True):
    """Of a log that can't be written (a full disk): a child's, so far; and to the frontend, which
    counts them in its metrics, those of all other processes of its node."""

    lines: int


ChildStatus = StartPhase | Progress | Ready | Failed | Heartbeat | LinesDropped


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """To the frontend, once: every worker is ready. `info` is what the first one's Ready said."""

    info: dict[str, Any]
    workers: dict[str, int] = {}  # name -> process id of those on this node


class EngineDied(msgspec.Struct, frozen=True, tag=True):
    """To the frontend: a worker is gone. End every open stream with an error event, then exit;
    what still runs after 1.5 seconds is killed. `cause` may be shown to clients."""

    cause: str


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Accept nothing new, finish what runs within `grace_s` seconds, then exit with status 0."""

    grace_s: float


ParentControl = EngineReady | EngineDied | Drain | LinesDropped


HF_TOKENIZER = "plugins.tokenizers._hf.tokenizer:load"  # of folders with tokenizer.json


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A model's files, found (and fetched where needed) before any process is started.

    Weights are files of one format (core.interfaces.checkpoint), or none (dummy). `tokenizer_dir`
    holds the files of a tokenizer and, in Hugging Face form, its chat templates.
    """

    hf_config: dict[str, Any]  # contents of config.json, also where the checkpoint is GGUF
    weight_files: list[str]
    weight_format: str  # name of a format, or "dummy"
    tokenizer_dir: str
    tokenizer: str = HF_TOKENIZER  # its `TokenizerKind.loader`
    eos_ids: list[int]  # every id that ends an answer
    default_sampling: dict[str, float]
    warnings: list[str] = []  # what a user should know of the files; shown once at start
    # How files without a config.json call the keys of `hf_config`, the place included.
    key_names: dict[str, str] = {}
    # Matrices in groups of 4- or 8-bit numbers: bits by name (core.interfaces.weights.GroupedInts).
    group_bits: dict[str, int] = {}
    num_tensors: int = 0  # that are stored; 0: none are, or nobody counted


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where the processes of one engine meet: ZeroMQ addresses (ipc:// files in a private folder
    on a single host, tcp:// between nodes), and the store of the process groups.

    The *leader* of a DP rank is the first rank of its attention group: it schedules.
    """

    engine: str  # the frontend binds (ROUTER), every leader connects (DEALER, named by DP rank)
    lockstep: str  # the leader of DP rank 0 binds (ROUTER), the other leaders connect
    steps: list[str]  # by DP rank: its leader binds (ROUTER), the other ranks of its group connect
    store: str  # a path (core.parallel.mesh), or where rank 0 binds (core.engine.build.rank_store)
    key: str = ""  # hex of 32 secret bytes that secure tcp:// sockets; empty: ipc only
