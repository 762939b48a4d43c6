"""Does a checkpoint hold what a model needs? Compared by headers, before any weight is read.

Every rank can say so alone and comes to the same answer, as it is about the whole model: no rank
waits in a collective for one that found a damaged file.
"""

import difflib
from collections.abc import Mapping, Sequence, Set

import torch

from core.errors import ModelError
from core.interfaces.model import BlockQuantization
from core.interfaces.weights import TensorInfo
from core.weights.manifest import (
    FP8,
    TensorRequest,
    is_block_quantised,
    scales_name,
    scales_shape,
    shape_text,
)

NUM_SHOWN = 5  # of each kind of problem
ADVICE = "check that the config and the weights belong together"
# Of scales; they are widened to float32, in which each of these is exact. Qwen's are bfloat16.
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CLOSE_CANDIDATES = 1000  # comparing a name with all of a large checkpoint's takes seconds
# Tensors that checkpoints may hold although no model takes them: buffers older versions of
# transformers saved, and output heads that are tied to the embedding.
_IGNORABLE_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_IGNORABLE_NAMES = frozenset({"lm_head.weight"})


def check_checkpoint(
    tensors: Mapping[str, TensorInfo],
    manifest: Sequence[TensorRequest],
    *,
    block: BlockQuantization,
    ignored: Sequence[str] = (),
) -> None:
    """Compare the headers of a checkpoint with what all ranks take together.

    `ignored`: prefixes of tensors that may be there though they are no part of the model. Raises
    ModelError that lists what is missing, of another shape or dtype, and surplus.
    """
    wanted = {take.name: take for take in manifest}
    missing = [take for name, take in wanted.items() if name not in tensors]
    problems = []
    if missing:
        problems.append(missing_text(missing, tensors))
    wrong = [
        problem
        for name, take in wanted.items()
        if name in tensors
        for problem in take_problems(take, tensors, block)
    ]
    problems += wrong[:NUM_SHOWN]
    if len(wrong) > NUM_SHOWN:
        problems.append(f"{len(wrong) - NUM_SHOWN} more tensors have another shape or dtype")
    surplus = surplus_names(tensors, wanted.keys(), ignored)
    if surplus:
        problems.append(surplus_text(surplus, tensors))
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ModelError(f"the weights are not those of {_config_of(tensors)}:{lines}\n{ADVICE}")


def take_problems(
    take: TensorRequest, tensors: Mapping[str, TensorInfo], block: BlockQuantization
) -> list[str]:
    """Why a stored tensor is not the one that is taken, one clause each."""
    info = tensors[take.name]
    what = f"tensor {take.name} in {info.file}"
    if info.shape != take.shape:
        needed = shape_text(take.shape)
        config = _config_of(tensors)
        return [f"{what} has shape {shape_text(info.shape)}, but {config} needs {needed}"]
    if is_block_quantised(info):
        return _scale_problems(what, take, tensors, block)
    if take.as_blocks:
        return [f"{what} has dtype {info.dtype}, but config.json says that it is {FP8} blocks"]
    if info.dtype not in _DTYPES:
        return [
            f"{what} has dtype {info.dtype}, a quantised format that is not supported; allowed: "
            "float32, bfloat16, float16, float64, and float8_e4m3fn matrices with scales"
        ]
    return []


def _scale_problems(
    what: str, take: TensorRequest, tensors: Mapping[str, TensorInfo], block: BlockQuantization
) -> list[str]:
    name, shape = scales_name(take.name), scales_shape(take.shape, block)
    scales = tensors.get(name)
    if scales is None:
        return [
            f"{what} is {FP8}, a quantised format that needs scales: {name} of shape "
            f"{shape_text(shape)} is missing"
        ]
    if scales.shape == shape and scales.dtype in SCALE_DTYPES:
        return []
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in SCALE_DTYPES)
    return [
        f"tensor {name} in {scales.file} has shape {shape_text(scales.shape)} and dtype "
        f"{scales.dtype}; needed: {shape_text(shape)}, one for each block of {block.rows} x "
        f"{block.columns}, in {allowed}"
    ]


def surplus_names(
    tensors: Mapping[str, TensorInfo],
    taken: Set[str],
    ignored: Sequence[str],
) -> list[str]:
    """Names in a checkpoint that nobody takes and that have no known reason to be there."""
    known = set(taken) | _IGNORABLE_NAMES
    known |= {scales_name(name) for name in known}
    prefixes = tuple(ignored)
    return sorted(
        name
        for name in tensors.keys() - known
        if not name.endswith(_IGNORABLE_SUFFIXES) and not name.startswith(prefixes)
    )


def surplus_text(surplus: Sequence[str], tensors: Mapping[str, TensorInfo]) -> str:
    """One clause about tensors that are too many."""
    count = "1 tensor" if len(surplus) == 1 else f"{len(surplus)} tensors"
    verb = "is" if len(surplus) == 1 else "are"
    shown = ", ".join(f"{name} (in {tensors[name].file})" for name in surplus[:NUM_SHOWN])
    rest = ", ..." if len(surplus) > NUM_SHOWN else ""
    return (
        f"{count} of the checkpoint {verb} not part of the model that {_config_of(tensors)} "
        "describes: "
        f"{shown}{rest}"
    )


def missing_text(missing: Sequence[TensorRequest], tensors: Mapping[str, TensorInfo]) -> str:
    """One clause about tensors that are not there."""
    files = sorted({info.file for info in tensors.values()})
    where = files[0] if len(files) == 1 else f"the {len(files)} weight files"
    shown = ", ".join(
        f"{take.name} of shape {shape_text(take.shape)}" for take in missing[:NUM_SHOWN]
    )
    if len(missing) == 1:
        close = difflib.get_close_matches(missing[0].name, _neighbours(missing[0].name, tensors), 1)
        hint = f" (the closest there is: {close[0]})" if close else ""
        return f"tensor {shown} is missing from {where}{hint}"
    rest = ", ..." if len(missing) > NUM_SHOWN else ""
    return f"{len(missing)} tensors are missing from {where}: {shown}{rest}"


def _config_of(tensors: Mapping[str, TensorInfo]) -> str:
    """What describes the model: a GGUF file has no config.json beside it."""
    file = next(iter(tensors.values())).file if tensors else ""
    return f"the metadata of {file}" if file.endswith(".gguf") else "config.json"


def _neighbours(name: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names that begin like this one, as many as can be compared quickly."""
    prefix = name
    while prefix:
        prefix = prefix.rpartition(".")[0]
        found = [other for other in tensors if other.startswith(prefix)]
        if found:
            return found[:_CLOSE_CANDIDATES]
    return []
