"""What the families of dense decoders share; a model plugin adds how its config.json reads.

Importing this module does not import torch: only `build` does.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from core.interfaces.model import BuildContext, Model, ModelSpec
from core.layers.decoder_spec import DecoderSpec
from core.parallel.sharding import tp_problems


class DenseFamily(ABC):
    """A family whose models are `core.layers.decoder.Decoder`s (core.interfaces.model)."""

    @abstractmethod
    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read the contents of a config.json. Raises ModelError for what is not supported."""

    def plan_problems(self, spec: ModelSpec, tp: int) -> list[str]:
        """Query heads and the intermediate size must divide; KV heads divide or are divided."""
        return tp_problems(
            tp,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            sizes={"intermediate_size": spec.intermediate_size},
        )

    def build(self, spec: ModelSpec, context: BuildContext) -> Model:
        """Build one rank's part."""
        from core.layers.decoder import Decoder

        assert isinstance(spec, DecoderSpec)
        return Decoder(spec, context)
