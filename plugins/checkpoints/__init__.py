"""Formats of checkpoints, and `dummy`, which makes weights up. Imports no torch."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_checkpoint_format() -> Sequence[Registration]:
    """The formats in this package."""
    return [
        Registration(
            name="safetensors",
            factory="plugins.checkpoints.safetensors:SafetensorsFormat",
            summary="a Hugging Face folder: config.json, *.safetensors, tokenizer.json",
        ),
        Registration(
            name="gguf",
            factory="plugins.checkpoints.gguf:GGUFFormat",
            summary="one .gguf file of llama.cpp, plain or quantised",
        ),
        Registration(
            name="dummy",
            factory="plugins.checkpoints.dummy:DummyWeights",
            summary="random weights in the model's shapes; reads none",
        ),
    ]
