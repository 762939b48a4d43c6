"""What a configuration that leaves things open means for a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from core.cluster.nodes.facts import config_facts
from core.errors import ConfigError, ModelError, PlanError
from core.interfaces.control import ModelFiles
from core.interfaces.launcher import NativeDtypes
from core.plugin.plugin_manager import PluginManager
from core.resolve import Resolved, find_family, resolve
from core.settings.compose import compose, parse_overrides
from core.settings.config import AppConfig, ModelConfig
from tests.support.models import TINY

NO_DTYPES = NativeDtypes(native={}, lacking={})


def resolved(model: str, *words: str) -> AppConfig:
    """The settled configuration of a preset whose shape is known."""
    return settled(model, words).config


def settled(
    model: str,
    words: Sequence[str],
    device: str = "cpu",
    *,
    dtypes: NativeDtypes = NO_DTYPES,
    changes: Mapping[str, Any] | None = None,
    group_bits: dict[str, int] | None = None,
    device_gib: float = 0.0,
) -> Resolved:
    """A preset whose shape is known, `changes` made to it."""
    config = compose(parse_overrides([f"+model={model}", *words]), [])
    assert config.model.shape is not None
    files = ModelFiles(
        hf_config=config.model.shape | (changes or {}),
        weight_files=[],
        weight_format="dummy",
        tokenizer_dir="",
        eos_ids=[],
        default_sampling={},
        group_bits=group_bits or {},
    )
    plugins = PluginManager.load()
    return resolve(config, plugins, files, device, dtypes, int(device_gib * 2**30))


@pytest.mark.parametrize(
    ("words", "device", "device_gib", "limit"),
    [
        ([], "cpu", 0, 256),
        ([], "cuda", 0, 256),  # a driver that doesn't tell
        ([], "cuda", 44.5, 256),
        ([], "cuda", 79.6, 512),
        ([], "cuda", 139.8, 512),
        (["parallel=tp2"], "cuda", 79.6, 512),
        (["parallel=tp2_ep2"], "cuda", 79.6, 256),
        (["parallel=tp2_ep2_dp2"], "cuda", 139.8, 256),
        (["engine.max_running_requests=24"], "cuda", 139.8, 24),
        (["engine.max_running_requests=900"], "cpu", 0, 900),
    ],
)
def test_large_gpus_run_more_requests_unless_told_otherwise(
    words: list[str], device: str, device_gib: float, limit: int
) -> None:
    config = settled("qwen3_moe_tiny", words, device, device_gib=device_gib).config
    assert config.engine.max_running_requests == limit
    assert config.engine.running_limit == limit


@pytest.mark.parametrize(
    ("model", "words", "page_size"),
    [
        ("llama31_8b", [], 16),
        ("qwen3_moe_tiny", [], 16),
        ("deepseek_v2_lite", [], 64),
        ("deepseek_v3_tiny", [], 64),
        ("llama31_8b", ["engine.page_size=64"], 64),
        ("deepseek_v3_tiny", ["engine.page_size=16"], 16),
        ("deepseek_v3_tiny", ["engine.page_size=1"], 1),
        ("deepseek_v3_tiny", ["engine.page_size=null"], 64),
    ],
)
def test_the_page_size_suits_the_model_unless_given(
    model: str, words: list[str], page_size: int
) -> None:
    config = resolved(model, *words)
    assert config.engine.page_size == config.engine.settled_page_size == page_size
    assert config_facts(config)["config engine.page_size"] == str(page_size)  # nodes compare it
    received: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))  # by a worker
    assert msgspec.convert(received, AppConfig) == config
    assert received["engine"]["page_size"] == page_size


@pytest.mark.parametrize(("model", "page_size"), [("llama31_8b", 16), ("deepseek_v3_tiny", 64)])
def test_the_kv_pool_holds_a_settled_page(model: str, page_size: int) -> None:
    least = f"engine.kv_cache_tokens={page_size}"
    assert resolved(model, least).engine.kv_cache_tokens == page_size
    fewer = f"engine.kv_cache_tokens={page_size - 1}"
    with pytest.raises(
        ConfigError, match=f"{fewer} is out of range; allowed: at least {page_size}"
    ):
        resolved(model, fewer)
    assert resolved(model, fewer, "engine.page_size=8").engine.page_size == 8


@pytest.mark.parametrize(
    ("changes", "max_model_len"),
    [
        # As Qwen's cards tell users to extend a model: max_position_embeddings stays.
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 512),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
            512,
        ),
        ({}, 128),
    ],
)
def test_the_length_is_what_yarn_reaches(changes: dict[str, Any], max_model_len: int) -> None:
    files = files_of(max_position_embeddings=128, **changes)
    model = ModelConfig(name="m")
    found = resolve(AppConfig(model=model), PluginManager.load([]), files, "cpu", NO_DTYPES)
    assert found.max_model_len == max_model_len
    model.max_model_len = max_model_len + 1
    longer, plugins = AppConfig(model=model), PluginManager.load([])
    with pytest.raises(PlanError, match="max_model_len"):
        resolve(longer, plugins, files, "cpu", NO_DTYPES)


def files_of(**changes: Any) -> ModelFiles:
    hf_config = TINY | {"architectures": ["LlamaForCausalLM"]} | changes
    return ModelFiles(
        hf_config=hf_config,
        weight_files=[],
        weight_format="gguf",
        tokenizer_dir="",
        eos_ids=[],
        default_sampling={},
        num_tensors=30,
        key_names={"hidden_size": "m.gguf: metadata llama.embedding_length"},
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": -1}, "^m.gguf: metadata llama.embedding_length=-1 is not supported"),
        ({"vocab_size": -1}, "^config.json: vocab_size=-1 is not supported"),
        ({"num_hidden_layers": 31}, "num_hidden_layers=31: the files hold 30 tensors"),
        (
            {"architectures": ["Llama4ForCausalLM"]},
            r"^config.json: architectures=\['Llama4ForCausalLM'\] is served by no model plugin; "
            r"did you mean 'LlamaForCausalLM'\?\nserved: Deepseek",
        ),
        (
            {"architectures": ["x" * 9999]},
            r"^config.json: architectures=\['x{60}\.\.\.'\] is served",
        ),
    ],
)
def test_a_config_that_cannot_be_served_is_named_by_the_files_own_key(
    changes: dict[str, Any], words: str
) -> None:
    config = AppConfig(model=ModelConfig(name="m"))
    with pytest.raises(ModelError, match=words):
        find_family(config, PluginManager.load([]), files_of(**changes))


@pytest.mark.parametrize(
    ("of_checkpoint", "native", "words", "dtype", "reason"),
    [
        ("bfloat16", ["bfloat16"], [], "bfloat16", "the checkpoint's; this CPU multiplies it (i)"),
        ("bfloat16", [], [], "float32", "not the checkpoint's bfloat16: no bfloat16 here"),
        ("float16", ["bfloat16"], [], "float32", "not the checkpoint's float16: no float16 here"),
        ("float32", [], [], "float32", ""),
        ("bfloat16", [], ["model.dtype=bfloat16"], "bfloat16", ""),
    ],
)
def test_a_cpu_computes_in_what_it_multiplies(
    of_checkpoint: str, native: list[str], words: list[str], dtype: str, reason: str
) -> None:
    dtypes = NativeDtypes(
        native=dict.fromkeys(native, "i"),
        lacking={name: f"no {name} here" for name in {"bfloat16", "float16"} - set(native)},
    )
    found = settled("llama31_8b", words, dtypes=dtypes, changes={"torch_dtype": of_checkpoint})
    assert (found.config.model.dtype, found.dtype_reason) == (dtype, reason)
    assert config_facts(found.config)["config model.dtype"] == f'"{dtype}"'  # nodes compare it
    on_gpu = settled(
        "llama31_8b", words, "cuda", dtypes=dtypes, changes={"torch_dtype": of_checkpoint}
    )
    assert on_gpu.config.model.dtype == (words[0].partition("=")[2] if words else of_checkpoint)
    assert on_gpu.dtype_reason == ""


GROUPS = {"model.layers.0.mlp.up_proj.weight": 4, "lm_head.weight": 8}


@pytest.mark.parametrize(
    ("words", "native", "device", "choice"),
    [
        ([], [], "cpu", "both"),
        ([], ["bfloat16"], "cpu", "both"),
        ([], [], "cuda", "dequantize"),
        (["model.dtype=float32"], [], "cpu", "dequantize"),  # whoever asks for it gets it exactly
        (["model.quantized_weights=keep"], ["bfloat16"], "cpu", "keep"),
        (["model.dtype=bfloat16"], ["bfloat16"], "cpu", "dequantize"),
        (["model.dtype=float32", "model.quantized_weights=both"], [], "cpu", "both"),
        (["model.quantized_weights=dequantize"], [], "cpu", "dequantize"),
    ],
)
def test_quantized_weights_stay_where_nobody_asks_for_a_dtype(
    words: list[str], native: list[str], device: str, choice: str
) -> None:
    dtypes = NativeDtypes(
        native=dict.fromkeys(native, "i"),
        lacking=dict.fromkeys({"bfloat16", "float16"} - set(native), "none"),
        grouped=True,
    )
    found = settled("llama31_8b", words, device, dtypes=dtypes, group_bits=GROUPS)
    assert found.config.model.quantized_weights == choice
    assert ("2 matrices stay in 4 and 8 bits" in found.dtype_reason) == (choice == "keep")
    assert ("2 matrices in 4 and 8 bits for few" in found.dtype_reason) == (choice == "both")


@pytest.mark.parametrize("choice", ["keep", "both"])
@pytest.mark.parametrize(
    ("grouped", "device", "group_bits"),
    [(False, "cpu", GROUPS), (True, "cuda", GROUPS), (True, "cpu", {})],
)
def test_keeping_what_cannot_be_kept_is_refused(
    grouped: bool, device: str, group_bits: dict[str, int], choice: str
) -> None:
    dtypes = NativeDtypes(native={}, lacking={"bfloat16": "none"}, grouped=grouped)
    found = settled("llama31_8b", [], device, dtypes=dtypes, group_bits=group_bits)
    assert found.config.model.quantized_weights == "dequantize"
    with pytest.raises(PlanError, match=f"quantized_weights={choice} needs a GGUF file"):
        settled(
            "llama31_8b",
            [f"model.quantized_weights={choice}"],
            device,
            dtypes=dtypes,
            group_bits=group_bits,
        )
