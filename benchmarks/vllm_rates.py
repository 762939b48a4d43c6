"""Times vLLM for `benchmarks.decode_prefill`, run with vLLM's own Python.

Imports nothing of Nodeweave. Speaks the lines that `benchmarks.decode_prefill` documents.
Arguments: a Hugging Face folder, the largest batch, the most tokens of a request, threads.
"""

import json
import os
import random
import sys
import time


def main() -> None:
    folder, max_batch, max_tokens, threads = sys.argv[1], *map(int, sys.argv[2:5])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that process_time counts the work
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    engine = LLM(
        model=folder,
        max_model_len=max_tokens,
        max_num_seqs=max_batch,
        enable_prefix_caching=False,
        disable_log_stats=True,
        dtype="bfloat16",
    )

    def turn(batch: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
        prompts = [
            {"prompt_token_ids": [random.randrange(10, 40000) for _ in range(prompt_tokens)]}
            for _ in range(batch)
        ]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        elapsed, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return {"seconds": elapsed, "cpu_seconds": cpu}

    print(json.dumps({"startup_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
