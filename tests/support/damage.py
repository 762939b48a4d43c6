"""Seeded damage to the files of a checkpoint: odd values in JSON, odd words in chat templates, odd
bytes in anything."""

import copy
import json
import random
from typing import Any

DEEP = "[" * 2000 + "]" * 2000
ODD_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1,
    2**63, 2**64, 10**400, -(2**63), -(2**70), 0.0, -0.5, 0.5, 1e-320, 1e308, 1e400, "", "x",
    "silu", "\u0000", "\ud800", "ü" * 3000, [], [[]], {}, {"": None}, {"a": {"b": [1]}}, [1, 2],
    [None], ["x"], [2**40], [-1], {"0": 0}, "LlamaForCausalLM", "full_attention",
    "sliding_attention", "yarn", "longrope", "linear", "llama3", "bfloat16", "fp8",
]  # fmt: skip
WORDS = (
    "factor", "rope_type", "type", "rope_theta", "short_factor", "long_factor", "content", "id",
    "quant_method", "weight_block_size", "original_max_position_embeddings", "attention_factor",
    "low_freq_factor", "high_freq_factor", "beta_fast", "mscale", "name", "template", "weight_map",
)  # fmt: skip
TEMPLATE_PIECES = (
    "{{", "}}", "{%", "%}", "{#", "#}", "-%}", "{% if", "{% endif %}", "{% for m in messages %}",
    "{% endfor %}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "{% set x = messages %}",
    "{% include 'a' %}", "{% import 'a' as b %}", "{% extends 'a' %}", "{% block a %}", "{% raw %}",
    "{% generation %}", "{% break %}", "{% continue %}", "{{ 1 / 0 }}", "{{ 2 ** 9999 }}",
    "{{ messages[9] }}", "{{ messages.append(1) }}", "{{ ''.__class__ }}", "{{ x|tojson }}",
    "{{ x|foo }}", "{{ foo(1) }}", "{{ raise_exception(1) }}", "{{ raise_exception() }}",
    "{{ strftime_now('%Q') }}", "{{ strftime_now(1) }}", "{{ namespace(1) }}", "{{ dict(1) }}",
    "{{ range(10**9) }}", "{{ '%s' % x }}", "{{ 'x' * 10**6 }}", "{{ {}[[]] }}", "|", "(", ")", "[",
    "]", "'", '"', "\\", "~", "not ", " in ", "none", "\u2028", "\x00", "\ud7ff", "content", "role",
)  # fmt: skip


def damaged_template(draw: random.Random, source: str) -> str:
    """Pieces of jinja put in, taken out, doubled or moved."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        start = draw.randrange(len(source) + 1)
        end = start + draw.choice([0, 0, 1, 3, 20, 200])
        kind = draw.randrange(4)
        put = {0: "", 1: source[start:end] * draw.choice([2, 50])}.get(
            kind, draw.choice(TEMPLATE_PIECES) * draw.choice([1, 1, 1, 300])
        )
        source = source[:start] + put + source[end:]
    return source


def odd_value(draw: random.Random) -> Any:
    """Something that few keys expect."""
    kind = draw.randrange(8)
    if kind == 0:
        return {draw.choice(WORDS): odd_value(draw) for _ in range(draw.randrange(1, 4))}
    if kind == 1:
        return [odd_value(draw) for _ in range(draw.randrange(4))]
    return copy.deepcopy(draw.choice(ODD_VALUES))


def damaged_json(draw: random.Random, content: dict[str, Any], keys: list[str]) -> bytes:
    """An object with a few odd values, at any depth; sometimes no JSON at all. `keys`: others that
    might be there."""
    changed = json.loads(json.dumps(content))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place = changed
        while True:
            inner = [key for key, value in place.items() if isinstance(value, dict) and value]
            if not inner or draw.random() < 0.5:
                break
            place = place[draw.choice(inner)]
        key = draw.choice([*place, *keys, *WORDS]) if draw.random() < 0.9 else "odd"
        if draw.random() < 0.15:
            place.pop(key, None)
        else:
            place[key] = odd_value(draw)
    raw = json.dumps(changed, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.15:
        return damaged_bytes(draw, raw)
    if draw.random() < 0.03:
        return b'{"a":' + DEEP.encode() + b"}"
    return raw


def damaged_bytes(draw: random.Random, raw: bytes, first: int = 0, last: int = 0) -> bytes:
    """Bytes overwritten, put in, taken out or cut off between two places."""
    data = bytearray(raw)
    last = min(last or len(data), len(data))
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(first, max(first + 1, last))
        kind = draw.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            width = draw.choice([1, 2, 4, 8])
            value = draw.choice([0, 1, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            data[at : at + width] = (value % (1 << (8 * width))).to_bytes(width, "little")
        elif kind == 2:
            data[at:at] = draw.choice([b"0", b'"', b"[", b"{", b"\xff", b"1e999", b"9" * 40])
        else:
            del data[at : at + draw.choice([1, 3, 50])]
    if draw.random() < 0.2:
        del data[draw.randrange(len(data) + 1) :]
    return bytes(data)
