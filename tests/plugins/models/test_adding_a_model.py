"""The family that docs/adding_a_model.md spells out is one; its oracle is Qwen2, which is alike."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from core.layers.decoder.decoder_spec import DecoderSpec
from core.plugin.hookspecs import NoOptions
from tests.support.models import family_of, folder_files

PAGE = Path(__file__).parents[3] / "docs" / "adding_a_model.md"


def module_of_the_page(folder: Path) -> ModuleType:
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert code is not None
    path = folder / "acme.py"
    path.write_text(code[1])
    spec = importlib.util.spec_from_file_location("acme", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_family_reads_a_config(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    acme = module_of_the_page(tmp_path)
    (registration,) = acme.register_model()
    assert registration.name == "AcmeForCausalLM"
    assert getattr(acme, registration.factory.partition(":")[2]) is acme.family
    qwen2 = folder_files(tiny_folder("qwen2")).hf_config
    expected = family_of(qwen2).parse(qwen2)
    assert isinstance(expected, DecoderSpec)
    hf_config = {key: value for key, value in qwen2.items() if "window" not in key}
    hf_config |= {"model_type": "acme", "attention_bias": True}
    found = acme.family(NoOptions()).parse(hf_config)
    assert found == replace(expected, architecture="AcmeForCausalLM")
    assert found.warnings == ()
