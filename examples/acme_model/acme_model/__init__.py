"""The plugin: a model family, named by the architecture in its config.json. Imports no torch: the
sizes of a model are read in processes that have none.

Seed-OSS is a Llama whose q, k and v have biases. Source: transformers' `modeling_seed_oss.py` and
`configuration_seed_oss.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.layers.basic.config_keys import ConfigKeys
from core.layers.basic.config_reader import ConfigReader
from core.layers.decoder.decoder_config import parse_decoder, parse_grouped_query
from core.layers.decoder.decoder_family import DecoderFamily
from core.layers.decoder.decoder_spec import DecoderSpec
from core.plugin.hookspecs import NoOptions, Registration, hookimpl

ARCHITECTURE = "SeedOssForCausalLM"
KEYS = ConfigKeys(
    model_type="seed_oss",
    read=frozenset({"attention_bias", "attention_out_bias", "mlp_bias"}),
    # What transformers takes where a config.json does not say it.
    defaults={"attention_bias": True, "num_key_value_heads": 8, "head_dim": 128},
    ignored={"residual_dropout": "only training reads it"},
)


class SeedOssFamily(DecoderFamily):
    """Fills core.interfaces.model.ModelFamily; DecoderFamily has the plans and the layers."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Seed-OSS config.json. Raises ModelError for what is not supported."""
        hf_config = KEYS.complete(hf_config)
        config = ConfigReader(hf_config)
        return parse_decoder(
            hf_config,
            architecture=ARCHITECTURE,
            keys=KEYS,
            attention=parse_grouped_query(
                hf_config,
                qkv_bias=config.flag("attention_bias", True),
                output_bias=config.flag("attention_out_bias", False),
            ),
            mlp_bias=config.flag("mlp_bias", False),
        )


def family(options: NoOptions) -> SeedOssFamily:
    """The factory that the plugin registers."""
    return SeedOssFamily()


@hookimpl
def register_model() -> Sequence[Registration]:
    """One family, found by `architectures` in a model's config.json."""
    return [Registration(name=ARCHITECTURE, factory="acme_model:family", summary="Seed-OSS")]
