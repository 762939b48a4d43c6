"""Seeded random checkpoints in Hugging Face form, for small configurations of real model families:
written once into the user's cache, and the same bytes on every machine.

Which tensors there are is asked of the family itself, so that a checkpoint is whole whatever it
holds. That needs torch, which whoever finds model files does not import: a process of its own
(`python -m core.sources.random_checkpoint`) writes. Knows nothing of any family.
"""

import hashlib
import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from core.disk.cache import cache_dir, locked, publish_dir
from core.errors import ConfigError, ModelError, NodeweaveError
from core.model_files.byte_tokenizer import byte_tokenizer_dir
from core.settings.config import ModelConfig, PluginChoice

if TYPE_CHECKING:
    from torch import Tensor

    from core.interfaces.model import ModelFamily, ModelSpec
    from core.weights.manifest import TensorRequest

FORMAT_VERSION = 1  # raise it where the same shape and seed give other contents
MAX_BYTES = 2 * 1024**3
DEFAULT_STD = 0.02  # of shapes without initializer_range
VECTOR_STD = 0.2  # of biases, and of norms around 1: what stays at 0 or 1 hides mistakes
WRITER = "core.sources.random_checkpoint"


class _Order(msgspec.Struct):
    """What the writing process is told on its standard input."""

    folder: str
    family: str
    seed: int
    shape: dict[str, Any]


def random_checkpoint_dir(model: ModelConfig) -> Path:
    """The folder of the cache that holds `model.random_checkpoint`, written first where it is not
    there. Blocks while it (or another process) writes: some seconds.

    Raises ConfigError or ModelError where the shape is missing, not supported, or too large.
    """
    assert model.random_checkpoint is not None
    if model.shape is None:
        raise ConfigError(
            "model.random_checkpoint is set, and model.shape is not; needed: the contents of a "
            "config.json as model.shape"
        )
    architectures = model.shape.get("architectures")
    family = model.family
    if family == "auto":
        if not isinstance(architectures, list) or not architectures:
            raise ConfigError(
                f"model.shape.architectures={architectures!r} is not known; needed: a list with "
                "the name of the model's class"
            )
        family = str(architectures[0])
    order = _Order("", family, model.random_checkpoint.seed, model.shape)
    content = msgspec.json.encode((FORMAT_VERSION, order), order="sorted")
    parent = cache_dir("random")
    folder = parent / hashlib.sha256(content).hexdigest()[:24]
    if folder.is_dir():
        return folder
    with locked(parent):
        if not folder.is_dir():
            _run_writer(msgspec.structs.replace(order, folder=str(folder)))
    return folder


def _run_writer(order: _Order) -> None:
    done = subprocess.run(
        [sys.executable, "-m", WRITER], input=msgspec.json.encode(order), capture_output=True
    )
    if done.returncode != 0:
        raise ModelError(
            "model.random_checkpoint can't be written: "
            + done.stderr.decode(errors="replace").strip().removeprefix("error: ")
        )


def write_random_checkpoint(
    folder: Path, family: "ModelFamily", shape: dict[str, Any], seed: int
) -> None:
    """Make `folder` appear with config.json, model.safetensors and a byte tokenizer.

    Matrices have the standard deviation that `shape` calls initializer_range, norms lie around 1.
    Imports torch.
    """
    from safetensors.torch import save

    spec = family.parse(shape)
    takes = _takes(family, spec)
    num_bytes = sum(math.prod(take.shape) * take.dtype.itemsize for take in takes)
    if num_bytes > MAX_BYTES:
        raise ModelError(
            f"{num_bytes / 1e9:.1f} GB of random weights; at most {MAX_BYTES / 1e9:.1f} GB are "
            "written: choose a smaller model.shape, or model.load_format=dummy, which needs no "
            "files"
        )
    std = float(shape.get("initializer_range", DEFAULT_STD))
    tensors = {take.name: _values(take, seed, std) for take in takes}
    files = {
        "config.json": msgspec.json.format(msgspec.json.encode(shape, order="sorted"), indent=2),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    for path in byte_tokenizer_dir(spec.vocab_size).iterdir():
        files[path.name] = path.read_bytes()
    publish_dir(folder, files)


def _takes(family: "ModelFamily", spec: "ModelSpec") -> list["TensorRequest"]:
    """Every tensor of a model: what its only rank would take."""
    import torch

    from core.interfaces.comm import SOLO
    from core.interfaces.model import BuildContext, ExpertContext
    from core.interfaces.weights import PlainFormat
    from core.ops.torch_ops import TorchOps
    from core.parallel.experts import default_placement
    from core.weights.reader import ShapeReader

    if spec.quantization is not None:
        raise ModelError("quantised weights are not made up; remove shape.quantization_config")
    dtype = getattr(torch, spec.dtype)
    experts = None
    if spec.moe is not None:
        placement = default_placement(spec.moe.num_experts, 1, 0)
        placements = dict.fromkeys(spec.moe.layers, placement)
        experts = ExpertContext(placements=placements, dispatchers={})
    reader = ShapeReader(dtype)
    context = BuildContext(
        weights=reader,
        comms=SOLO,
        ops=TorchOps(),
        dtype=dtype,
        device=torch.device("meta"),
        format=PlainFormat(),
        experts=experts,
    )
    family.build(spec, context)
    return reader.manifest


def _values(take: "TensorRequest", seed: int, std: float) -> "Tensor":
    """Random values that depend on seed and name only.

    Uniform, made of raw random integers with exact arithmetic: the same bits on every processor
    and with every version, which no library promises of its normal distribution.
    """
    import numpy as np
    import torch

    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(take.name.encode())]))
    raw = bits.random_raw(math.prod(take.shape)) >> np.uint64(40)  # 24 bits: exact in float32
    unit = (raw.astype(np.float32) - np.float32(2**23)) / np.float32(2**23)  # from -1 to 1
    is_vector = len(take.shape) == 1
    values = unit * np.float32((VECTOR_STD if is_vector else std) * math.sqrt(3))
    if is_vector and "norm" in take.name:
        values += np.float32(1)
    return torch.from_numpy(values.reshape(take.shape)).to(take.dtype)


def main() -> int:
    """Write what standard input says; returns the exit status."""
    from core.plugin.plugin_manager import PluginManager

    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    try:
        family = PluginManager.load().table("model").create(PluginChoice(name=order.family))
        write_random_checkpoint(Path(order.folder), family, order.shape, order.seed)
    except NodeweaveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
