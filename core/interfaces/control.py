"""Messages between a parent process and its children: JSON lines over inherited pipes.

Child to parent: one `ChildStatus` per line. Parent to child: one `ParentControl` per line. The end
of that stream means that the parent is gone; the child then ends itself.
"""

from typing import Any

import msgspec


class StartPhase(msgspec.Struct, frozen=True, tag=True):
    """A start-up phase ended ("import", "load weights", "kv pool", "warm up"...)."""

    name: str
    seconds: float


class Progress(msgspec.Struct, frozen=True, tag=True):
    """The progress of a long task, sent at most about ten times a second."""

    task: str
    done: int
    total: int
    unit: str  # "B" or "tensors"


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The child is ready to serve. `info` has plain values for the summary."""

    info: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The child ends because of an error. `kind` is its class in core.errors, or "internal".

    `blames` names processes ("worker 1") to which messages, or with which collectives, failed. The
    end of any of them explains the error.
    """

    kind: str
    message: str
    blames: list[str] = []


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """A worker lives. Sent several times a second once it is ready.

    The supervisor detects a worker that sends none (it is stopped), or one that makes no progress
    while `finished` is less than `launched`."""

    launched: int  # steps started since the start
    finished: int  # of these, steps that have ended
    pieces: int = 0  # finished parts of steps: layers, parts of prompt logprobs
    cpu_s: float = 0.0  # CPU time of the computing thread; 0: another device computes
    expected_s: float = 0.0  # seconds that the current step should take; 0: not known


class LinesDropped(msgspec.Struct, frozen=True, tag=True):
    """The number of dropped lines of a log that cannot be written (a full disk).

    From a child: its own lines so far. To the frontend, which counts them in its metrics: those of
    all other processes of its node."""

    lines: int


ChildStatus = StartPhase | Progress | Ready | Failed | Heartbeat | LinesDropped


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """To the frontend, once: all workers are ready. `info` is that of the first worker's Ready."""

    info: dict[str, Any]
    workers: dict[str, int] = {}  # name -> process id of those on this node


class EngineDied(msgspec.Struct, frozen=True, tag=True):
    """To the frontend: a worker died. End every open stream with an error event, then exit.

    A frontend that still runs after 1.5 seconds is killed. Clients may see `cause`."""

    cause: str


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Accept no new requests, finish running ones within `grace_s` seconds, exit with status 0."""

    grace_s: float


ParentControl = EngineReady | EngineDied | Drain | LinesDropped


HF_TOKENIZER = "plugins.tokenizers._hf.tokenizer:load"  # of folders with tokenizer.json


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a model, found (and downloaded if needed) before any process is started.

    The weights are files of one format (core.interfaces.checkpoint), or none (dummy).
    `tokenizer_dir` has the files of a tokenizer and its chat templates, as on Hugging Face.
    """

    hf_config: dict[str, Any]  # contents of config.json, also where the checkpoint is GGUF
    weight_files: list[str]
    weight_format: str  # name of a format, or "dummy"
    tokenizer_dir: str
    tokenizer: str = HF_TOKENIZER  # its `TokenizerKind.loader`
    eos_ids: list[int]  # every id that ends an answer
    default_sampling: dict[str, float]
    warnings: list[str] = []  # about the files, for the user; shown once at the start
    # For files without a config.json: their own names, with the file, for keys of `hf_config`.
    key_names: dict[str, str] = {}
    # Matrices in groups of 4- or 8-bit numbers: bits by name (core.interfaces.weights.GroupedInts).
    group_bits: dict[str, int] = {}
    num_tensors: int = 0  # that are stored; 0: none are, or nobody counted


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses at which processes of one engine connect, and the store of process groups.

    They are ZeroMQ addresses: ipc:// files in a private folder on a single host, tcp:// between
    nodes. The *leader* of a DP rank is the first rank of its attention group; it schedules.
    """

    engine: str  # the frontend binds (ROUTER), every leader connects (DEALER, named by DP rank)
    lockstep: str  # the leader of DP rank 0 binds (ROUTER), the other leaders connect
    steps: list[str]  # by DP rank: its leader binds (ROUTER), the other ranks of its group connect
    store: str  # a path (core.parallel.mesh), or where rank 0 binds (core.engine.build.rank_store)
    key: str = ""  # 32 secret bytes in hex that protect tcp:// sockets; empty: ipc only
