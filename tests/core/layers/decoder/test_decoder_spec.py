"""What a config.json of any family may say, and the errors for the rest."""

from typing import Any

import pytest

from core.errors import ModelError
from core.interfaces.model import BlockQuantization
from tests.support.models import TINY, family_of

NAMES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


def config(name: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    return TINY | {"architectures": [name], "sliding_window": None} | changes


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in config().items() if name != key}


def fp8(**changes: Any) -> dict[str, Any]:
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return config(quantization_config=quantization | changes)


def qwen3_windows(**changes: Any) -> dict[str, Any]:
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 64}
    return config("Qwen3ForCausalLM", **(windows | changes))


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_read(name: str) -> None:
    hf_config = config(name, dtype="bfloat16", tie_word_embeddings=True)
    spec = family_of(hf_config).parse(hf_config)
    assert spec.architecture == name
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (3, 96, 192)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (12, 4, 16)
    assert (spec.vocab_size, spec.max_position_embeddings) == (263, 512)
    assert spec.dtype == "bfloat16"


def test_defaults_are_those_of_transformers() -> None:
    bare = without("num_key_value_heads")
    del bare["head_dim"]
    spec = family_of(bare).parse(bare)
    assert (spec.num_kv_heads, spec.head_dim, spec.dtype) == (12, 8, "float32")
    qwen = bare | {"architectures": ["Qwen3ForCausalLM"]}
    assert family_of(qwen).parse(qwen).head_dim == 128


def test_old_dtype_key_is_read() -> None:
    hf_config = config(torch_dtype="float16")
    assert family_of(hf_config).parse(hf_config).dtype == "float16"


@pytest.mark.parametrize(
    ("hf_config", "words"),
    [
        (without("hidden_size"), ["hidden_size is missing"]),
        (without("vocab_size"), ["vocab_size is missing"]),
        (config(num_hidden_layers=0), ["num_hidden_layers=0", "above 0"]),
        (config(num_hidden_layers=True), ["num_hidden_layers=True"]),
        (config(intermediate_size="192"), ["intermediate_size='192'"]),
        (config(num_key_value_heads=5), ["num_key_value_heads=5", "num_attention_heads=12"]),
        (config(head_dim=15), ["head_dim=15", "even"]),
        (config(hidden_act="gelu"), ["hidden_act='gelu'", "silu"]),
        (config(attention_bias=1), ["attention_bias=1", "true or false"]),
        (config(rms_norm_eps=-1.0), ["rms_norm_eps=-1.0"]),
        (config(dtype="int8"), ["dtype='int8'", "bfloat16"]),
        (config(quantization_config={"quant_method": "gptq"}), ["'gptq'", "fp8", ".gguf"]),
        (config(quantization_config="fp8"), ["quantization_config='fp8'", "object"]),
        (fp8(weight_block_size=None), ["weight_block_size=None", "128 x 128"]),
        (fp8(weight_block_size=[64, 64]), ["weight_block_size=[64, 64]", "128 x 128"]),
        (fp8(fmt="e5m2"), ["fmt='e5m2'", "e4m3"]),
        (fp8(activation_scheme="static"), ["activation_scheme='static'", "dynamic"]),
        (config(rope_scaling={"type": "dynamic"}), ["dynamic"]),
        (config(rope_parameters={"rope_theta": 1e300}), ["rope_theta=1e+300", "1e-09 to 1e+12"]),
        (
            config(
                rope_scaling={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "beta_fast": 1e-320,
                }
            ),
            ["beta_fast=1e-320", "1e-09 to 1e+12"],
        ),
        (config(layer_types=["sliding_attention"]), ["sliding_attention", "full_attention"]),
        (
            config("MistralForCausalLM", sliding_window=511),
            ["sliding_window=511", "null", "512 tokens", "max_position_embeddings=511"],
        ),
        # Mistral doesn't read `use_sliding_window`.
        (
            config("MistralForCausalLM", sliding_window=64, use_sliding_window=False),
            ["sliding_window=64"],
        ),
        (qwen3_windows(max_window_layers=2), ["sliding_window=64"]),
        (qwen3_windows(max_window_layers=3, rope_scaling={"type": "x"}), ["rope_type='x'"]),
        (
            qwen3_windows(layer_types=["full_attention", "sliding_attention", "full_attention"]),
            ["layer_types", "sliding_attention"],
        ),
        (config(layer_types=3), ["layer_types=3"]),
        (config(per_layer_config={"0": {"head_dim": 8}}), ["per_layer_config", "null"]),
        (config(rope_interleaved=True), ["rope_interleaved=True", "false"]),
        (config(num_hidden_layers=10**400), ["num_hidden_layers", "up to 10000"]),
        (config(vocab_size=1 << 31), ["vocab_size=2147483648", "up to 2147483647"]),
        (config(max_position_embeddings=1 << 27), ["max_position_embeddings=", "up to 16777216"]),
        (config(rms_norm_eps=10**400), ["rms_norm_eps", "above 0"]),
        (config(hidden_act=["silu"]), ["hidden_act=['silu']"]),
        (fp8(scale_fmt="int"), ["scale_fmt='int'", "float"]),
        (fp8(expert_dtype="fp4"), ["expert_dtype='fp4'", "fp8"]),
    ],
)
def test_what_is_not_supported_is_named(hf_config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        family_of(hf_config).parse(hf_config)
    assert "config.json" in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_fp8_blocks_are_read() -> None:
    spec = family_of(fp8()).parse(fp8())
    assert spec.quantization == BlockQuantization(rows=128, columns=128)
    assert family_of(config()).parse(config()).quantization is None


@pytest.mark.parametrize(
    "hf_config",
    [
        config("Qwen2ForCausalLM", use_sliding_window=False, sliding_window=64),
        qwen3_windows(max_window_layers=3),  # of the three layers none has a window
        qwen3_windows(),  # max_window_layers is 28 where nothing is said
        qwen3_windows(max_window_layers=0, layer_types=["full_attention"] * 3),
        qwen3_windows(max_window_layers=0, sliding_window=512),
        qwen3_windows(layer_types=["sliding_attention"] * 3, sliding_window=512),
        config("MistralForCausalLM", sliding_window=512),
        config("MistralForCausalLM", sliding_window=4096),
        {k: v for k, v in config("MistralForCausalLM").items() if k != "sliding_window"},
    ],
)
def test_windows_that_no_layer_uses_or_that_hold_the_context_are_none(
    hf_config: dict[str, Any],
) -> None:
    assert family_of(hf_config).parse(hf_config).num_layers == 3


def test_a_window_must_hold_what_yarn_extends_to() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    for window, served in ((2047, False), (2048, True)):
        hf_config = config("MistralForCausalLM", sliding_window=window, rope_scaling=yarn)
        if served:
            assert family_of(hf_config).parse(hf_config).max_position_embeddings == 2048
        else:
            with pytest.raises(ModelError, match="2048 tokens"):
                family_of(hf_config).parse(hf_config)


def test_keys_that_are_not_known_are_warned_of() -> None:
    hf_config = config(
        model_type="granite",
        logits_scaling=8.0,
        unknown=None,
        rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 3},
        quantization_config={
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "kv_cache_scheme": {"type": "float"},
        },
    )
    warnings = family_of(hf_config).parse(hf_config).warnings
    for words in ("model_type='granite'", "logits_scaling", "beta_fast", "kv_cache_scheme"):
        assert any(words in warning for warning in warnings), words
    assert not any("unknown" in warning for warning in warnings)
    assert family_of(config()).parse(config()).warnings == ()
