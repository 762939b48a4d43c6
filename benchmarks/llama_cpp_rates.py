"""Times llama.cpp (PyPI `xllamacpp`) for `benchmarks.decode_prefill`, with a Python that has it.

Imports nothing of Nodeweave. Speaks the lines that `benchmarks.decode_prefill` documents.
Arguments: the GGUF file, the largest batch, the most tokens of a request, threads.
"""

import json
import random
import sys
import threading
import time


def main() -> None:
    import xllamacpp

    path, max_batch, max_tokens, threads = sys.argv[1], *map(int, sys.argv[2:5])
    start = time.perf_counter()
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = max_batch
    params.n_ctx = max_batch * max_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)

    def complete(prompt: list[int], tokens: int, counts: list[int]) -> None:
        body = {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = server.handle_completions(body)
        counts.append(answer["usage"]["completion_tokens"])

    def turn(batch: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
        counts: list[int] = []
        clients = [
            threading.Thread(
                target=complete,
                args=(
                    [random.randrange(10, 40000) for _ in range(prompt_tokens)],
                    tokens,
                    counts,
                ),
            )
            for _ in range(batch)
        ]
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        elapsed, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        assert counts == [tokens] * batch, counts
        return {"seconds": elapsed, "cpu_seconds": cpu}

    print(json.dumps({"startup_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
