"""SmolLM2-135M-Instruct, real weights: the preset's files, and a Hugging Face folder of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.interfaces.control import ModelFiles
from core.settings.compose import compose, parse_overrides
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from tests.support.formats import FILE_PLUGINS

if TYPE_CHECKING:
    import torch


def preset() -> ModelConfig:
    """The model section of `+model=smollm2`."""
    return compose(parse_overrides(["+model=smollm2"])).model


def files() -> ModelFiles:
    """The GGUF and its tokenizer, fetched into the cache where they are not there yet."""
    return resolve_files(preset(), FILE_PLUGINS, lambda *_: None)


def write_folder(folder: Path) -> Path:
    """A Hugging Face folder (bf16 safetensors), written by transformers from the GGUF."""
    import torch
    import transformers

    dequantized(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**_source()).save_pretrained(folder)
    return folder


def dequantized(dtype: "torch.dtype") -> Any:
    """transformers' model of the GGUF."""
    import transformers

    # Recent releases of transformers keep GGUF weights packed unless told not to.
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    return transformers.AutoModelForCausalLM.from_pretrained(**_source(), **options, dtype=dtype)


def _source() -> dict[str, str]:
    gguf = Path(files().weight_files[0])
    return {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
