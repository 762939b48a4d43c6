"""Steps of made-up requests, run before serving: the worst a rank may meet, and those that between
them meet every kernel. All of their tokens lie on the scratch page; nobody reads their results.

Pure: knows the limits of the scheduler, nothing of models or devices.
"""

from collections.abc import Sequence

from msgspec import structs

from core.interfaces.messages import SamplingParams, ScheduledStep, SlotInit
from core.settings.config import EngineConfig

GREEDY = SamplingParams(max_tokens=2, temperature=0.0)
# Everything that makes copies of the logits at once.
COSTLIEST = SamplingParams(
    max_tokens=2,
    temperature=1.0,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    logprobs=20,
)
PROMPT_LOGPROBS = 20
# Longer contexts only take time: of several sequences together they fit no pool, and of one what
# they need beside the cache does not grow with them.
MOST_CONTEXT_TOKENS = 1 << 20  # of all decodes
LONGEST_PREFILL_CONTEXT = 1 << 14


def step(
    *,
    decodes: Sequence[int] = (),
    prompts: Sequence[tuple[int, int]] = (),
    sampling: SamplingParams = GREEDY,
) -> ScheduledStep:
    """One step that fills slots from 0 on: decodes by their context with the new token, prompts by
    (tokens cached before, new tokens). Where `sampling` wants logprobs, the first prompt's are
    wanted too."""
    rows = [(context - 1, 1) for context in decodes] + list(prompts)
    inits = [
        SlotInit(slot, [0], start + length, sampling, 0)
        for slot, (start, length) in enumerate(rows)
    ]
    num_logprob_rows = 0
    if sampling.logprobs is not None and prompts:
        first = inits[len(decodes)]
        wanted = structs.replace(sampling, prompt_logprobs=PROMPT_LOGPROBS)
        inits[len(decodes)] = structs.replace(first, sampling=wanted)
        num_logprob_rows = prompts[0][1] - 1
    return ScheduledStep(
        0,
        inits,
        len(decodes),
        list(range(len(rows))),
        [start for start, _ in rows],
        [length for _, length in rows],
        [True] * len(rows),
        [],
        [],
        [],
        num_logprob_rows,
    )


def largest_decode(
    engine: EngineConfig, max_model_len: int, sampling: SamplingParams = GREEDY
) -> ScheduledStep:
    """A decode step of as many requests as may run; one has the longest context."""
    count = engine.running_limit
    context = max(1, min(max_model_len, MOST_CONTEXT_TOKENS // count))
    return step(decodes=[max_model_len, *[context] * (count - 1)], sampling=sampling)


def largest_prefills(
    engine: EngineConfig, max_model_len: int, sampling: SamplingParams = GREEDY
) -> list[ScheduledStep]:
    """Steps of as many new tokens as one may have, decodes among them: of few prompts with much
    before them in the cache, and of many short ones."""
    count = engine.running_limit
    budget = most_prompt_tokens(engine, max_model_len)
    longest = min(longest_chunk(engine, max_model_len), budget)
    before = max(0, min(max_model_len, LONGEST_PREFILL_CONTEXT) - longest)
    steps = []
    for length in (longest, max(1, budget // count)):
        length = min(length, longest)
        num_prompts = min(count, max(1, budget // length))
        lengths = [length] * num_prompts
        if num_prompts < count and sum(lengths) < budget:
            lengths.append(budget - sum(lengths))
        decodes = [min(max_model_len, 2)] * (count - len(lengths))
        prompts = [(before, length) for length in lengths]
        steps.append(step(decodes=decodes, prompts=prompts, sampling=sampling))
    return steps


def captured_prefill(engine: EngineConfig, max_model_len: int, most_rows: int) -> ScheduledStep:
    """A step of at most so many rows, of as few prompts as may have them."""
    length = min(longest_chunk(engine, max_model_len), most_rows)
    count = min(engine.running_limit, most_rows // length)
    return step(prompts=[(0, length)] * count)


def longest_chunk(engine: EngineConfig, max_model_len: int) -> int:
    """New tokens that one prompt may have in a step."""
    chunk = engine.chunked_prefill_size
    return max_model_len if chunk == -1 else min(chunk, max_model_len)


def most_prompt_tokens(engine: EngineConfig, max_model_len: int) -> int:
    """New prompt tokens that one step may have."""
    budget = engine.max_prefill_tokens
    if engine.chunked_prefill_size == -1:
        budget = max(budget, max_model_len)  # one prompt may exceed the budget of a step
    return min(budget, engine.running_limit * max_model_len)


def row_counts(most: int) -> list[int]:
    """Numbers of rows that between them fall into every bucket kernels have by size: the powers of
    two, and numbers between them that nothing divides. Up to `most`, which is among them."""
    counts = {most}
    power = 1
    while power <= most:
        counts |= {power, power + power // 2 + 1}
        power *= 2
    return sorted(count for count in counts if count <= most)


def kernel_steps(engine: EngineConfig, max_model_len: int, *, decodes: bool) -> list[ScheduledStep]:
    """Steps of all row counts, none that a captured step is made for unless `decodes`: decodes of
    short and long contexts beside a prompt, one prompt alone, and several: the longest ones, and
    as many as fit of each length, with and without a token in the cache."""
    steps = []
    count = engine.running_limit
    budget = most_prompt_tokens(engine, max_model_len)
    chunk = min(longest_chunk(engine, max_model_len), budget)
    prompt = (0, min(16, chunk))
    for rows in row_counts(count):
        longest = max(1, min(max_model_len, MOST_CONTEXT_TOKENS // rows))
        for context in sorted({min(2, max_model_len), longest}):
            if decodes:
                steps.append(step(decodes=[context] * rows))
            if rows < count:
                steps.append(step(decodes=[context] * rows, prompts=[prompt]))
    for rows in row_counts(chunk):
        steps.append(step(prompts=[(0, rows)]))
    if chunk < max_model_len:  # the rest of a prompt, with its beginning in the cache
        steps.append(step(prompts=[(max_model_len - chunk, chunk)]))
    for rows in row_counts(budget):
        lengths = [chunk] * (rows // chunk) + [rows % chunk] * (rows % chunk > 0)
        if 1 < len(lengths) < count:
            steps.append(step(decodes=[2], prompts=[(0, length) for length in lengths]))
    for length in row_counts(chunk):
        if length.bit_count() == 1:  # what kernels do with a power of two, they do with more
            continue
        num_prompts = min(count, budget // length)
        steps.append(step(prompts=[(0, length)] * num_prompts))
        if length < max_model_len:
            steps.append(step(prompts=[(1, length)] * num_prompts))
    return steps
