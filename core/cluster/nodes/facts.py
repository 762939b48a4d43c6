"""What must be the same on every node, as plain text by key. Imports no torch, opens no socket.

Keys begin with a kind: "config engine.page_size", "code core/worker.py", "plugin acme",
"package torch", "model config.json ...", "weights model-1.safetensors", "machine device".
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from core.disk.progress import ByteMeter, OnProgress
from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.interfaces.launcher import Machine
from core.settings.config import AppConfig, plain_values

# May differ: where things lie on a node, what belongs to one node, and what only node 0 uses.
FREE_KEYS = (
    "cluster.token_file",
    "frontend",
    "launch.dist_init_addr",
    "launch.name",
    "launch.node_rank",
    "launch.options",
    "launch.threads_per_worker",
    "metrics",
    "model.name",  # of +model=custom it is the folder's; what it means is in "model config.json"
    "model.package",
    "model.path",
    "parallel.eplb.load_file",
)
# Compared by version; nvidia-nccl-* also by its library. Those that ranks speak or compute with.
PACKAGES = ("torch", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "sgl-deep-ep", "pyzmq")
MISSING = "not there"
_NCCL_LIBRARY = "libnccl.so.2"
_SAMPLES = 16  # parts of a weight file that are looked at besides its header
_SAMPLE_BYTES = 4096
_CHUNK_BYTES = 8 * 1024 * 1024
_THREADS = 8
_ROOT = Path(__file__).resolve().parents[3]


def gather(
    config: AppConfig,
    plugins: Mapping[str, str],
    files: ModelFiles,
    machine: Machine,
    on_progress: OnProgress,
) -> dict[str, str]:
    """Every fact of this node. `plugins` is the plugin manager's fingerprint.

    With cluster.verify_weights=full it reads all weight files, and tells how far it is.
    """
    return {
        **config_facts(config),
        **{f"plugin {name}": version for name, version in plugins.items()},
        **code_facts(_ROOT),
        **package_facts(),
        "machine device": machine.device,
        **model_facts(files),
        **weight_facts(files, config.cluster.verify_weights == "full", on_progress),
    }


def config_facts(config: AppConfig) -> dict[str, str]:
    """Every key that must agree, and the contents of the files that keys name."""
    found = {
        f"config {key}": value
        for key, value in _flatten(plain_values(config))
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    }
    load_file = config.parallel.eplb.load_file
    if load_file is not None:
        try:
            digest = _digest(Path(load_file).expanduser().read_bytes())
        except OSError as error:
            digest = f"can't be read: {error.strerror}"
        found["config parallel.eplb.load_file (contents)"] = digest
    return found


def code_facts(root: Path) -> dict[str, str]:
    """A hash of every source file of Nodeweave."""
    return {
        f"code {path.relative_to(root)}": _digest(path.read_bytes())
        for folder in ("core", "plugins")
        for path in sorted((root / folder).rglob("*.py"))
    }


def package_facts() -> dict[str, str]:
    """Versions of Python and of the packages that ranks depend on each other by."""
    found = {"package python": platform.python_version()}
    for name in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"package {name}"] = MISSING
            continue
        found[f"package {name}"] = distribution.version
        for file in distribution.files or ():
            if file.name == _NCCL_LIBRARY:
                found[f"package {name}: {_NCCL_LIBRARY}"] = _sampled(Path(str(file.locate())), 0)
    return found


def model_facts(files: ModelFiles) -> dict[str, str]:
    """The checkpoint's config.json, key by key, and what is read beside it."""
    return {
        "model weight format": files.weight_format,
        "model eos ids": str(files.eos_ids),
        **{f"model config.json {key}": value for key, value in _flatten(files.hf_config)},
    }


def weight_facts(files: ModelFiles, full: bool, on_progress: OnProgress) -> dict[str, str]:
    """Size and hash of every weight file: of all of it, or of its header and of samples spread
    over it, which tell other weights of the same shape but not one changed number."""
    paths = [Path(path) for path in files.weight_files]
    try:
        if full:
            total_bytes = sum(path.stat().st_size for path in paths)
            meter = ByteMeter("verify weights", total_bytes, on_progress)
            values = [_whole(path, meter) for path in paths]
            meter.finish()
        else:
            with ThreadPoolExecutor(_THREADS) as threads:
                values = list(threads.map(_header_and_samples, paths))
    except OSError as error:
        raise ModelError(f"can't read {error.filename}: {error.strerror}") from error
    return {f"weights {path.name}": value for path, value in zip(paths, values, strict=True)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, json.dumps(value, sort_keys=True, default=str)


def _header_and_samples(path: Path) -> str:
    header_bytes = 0
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
    return _sampled(path, header_bytes)


def _sampled(path: Path, header_bytes: int) -> str:
    """Size and hash of the first `header_bytes` and of `_SAMPLES` parts, the last among them."""
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        state = hashlib.blake2b(digest_size=8)
        file.seek(0)
        state.update(file.read(min(header_bytes, file_bytes)))
        span = max(file_bytes - header_bytes - _SAMPLE_BYTES, 0)
        for index in range(_SAMPLES):
            file.seek(min(header_bytes, file_bytes) + span * index // (_SAMPLES - 1))
            state.update(file.read(_SAMPLE_BYTES))
    return f"{file_bytes} bytes, samples {state.hexdigest()}"


def _whole(path: Path, meter: ByteMeter) -> str:
    state = hashlib.blake2b(digest_size=16)
    num_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
            num_bytes += len(chunk)
            meter.add(len(chunk))
    return f"{num_bytes} bytes, hash {state.hexdigest()}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
