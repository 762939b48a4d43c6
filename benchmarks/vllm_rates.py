"""Offline rates of vLLM, run by `benchmarks.decode_prefill` with vLLM's own Python.

Imports nothing of Nodeweave. Prints the JSON lines that `benchmarks.decode_prefill` documents.
"""

import json
import random
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, batches, prompt_tokens, new_tokens = (
        sys.argv[1],
        [int(batch) for batch in sys.argv[2].split(",")],
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
    start = time.perf_counter()
    engine = LLM(
        model=folder,
        max_model_len=2048,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        disable_log_stats=True,
        dtype="bfloat16",
    )
    print(json.dumps({"startup_s": time.perf_counter() - start}), flush=True)

    def seconds(batch: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [random.randrange(10, 40000) for _ in range(prompt_tokens)]}
            for _ in range(batch)
        ]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return elapsed

    seconds(2, 4)
    for batch in batches:
        prefill = min(seconds(batch, 1) for _ in range(3))
        full = min(seconds(batch, new_tokens + 1) for _ in range(3))
        row = {
            "batch": batch,
            "prefill_tok_s": batch * prompt_tokens / prefill,
            "decode_tok_s": batch * new_tokens / (full - prefill),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
