"""The interface of a checkpoint format: recognise a folder or file, read its config, open it.

Also the interface of a generator, which makes weights without files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from core.interfaces.control import ModelFiles
from core.settings.config import ModelConfig

if TYPE_CHECKING:  # these import torch, which the parent does not need to find and read files
    import torch

    from core.interfaces.weights import OpenedWeights, WeightSource


class CheckpointFormat(Protocol):
    """A format of models on a disk. Its module must not import torch before `open` is called."""

    # What the format needs, such as "a .gguf file"; for the error if no format recognises a path.
    needs: str
    # Patterns of the weight files in a repository of the Hugging Face Hub, such as "*.safetensors".
    # Config and tokenizer files are fetched anyway. (): nothing is fetched for this format.
    hub_files: Sequence[str]

    def recognises(self, location: Path) -> bool:
        """Whether an existing folder or file has weights of this format. Cheap; never raises."""
        ...

    def stands_in(self, location: Path) -> bool:
        """Whether this format should `read` a path that no format recognises.

        That is for a config without weights, or for an error that says what is missing."""
        ...

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        """Return the model's config, weight files, tokenizer, and bits of quantised matrices.

        The field `weight_format` of the result is replaced by the name of the format. With
        `with_weights=False` (dummy weights), damaged or missing weight files are not an error.
        Raises ModelError, which names the file.
        """
        ...

    def open(self, files: ModelFiles, dtype: "torch.dtype") -> "WeightSource":
        """Open the weights of `files`, which `read` returned.

        `dtype` is the model's dtype, for formats that convert while they read. Raises ModelError.
        """
        ...


@runtime_checkable
class WeightGenerator(Protocol):
    """Makes weights for a model that has only a config (`model.load_format=dummy`).

    If the model has a path, config and tokenizer are read by the format of that path. Otherwise the
    config is `model.shape`, and the tokenizer has one token for each byte.
    """

    def generate(
        self,
        model: ModelConfig,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        on_progress: Callable[[str, int, int, str], None],
        total_bytes: int,
    ) -> "OpenedWeights":
        """Return the weights of one rank, on `device`.

        They have `total_bytes` bytes (0: not known). Call `on_progress` (task, done, total, "B") at
        most ten times a second."""
        ...
