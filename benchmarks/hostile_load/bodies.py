"""Attacks of one request each: every function returns the bytes of one, chosen by chance.

What is allowed but heavy is here as well: nobody is refused for a long prompt. The kinds are in
`ONE_REQUEST`, each with the seconds between two of it.
"""

import functools
import gzip
import json
import random
from collections.abc import Callable

from benchmarks.hostile_load.connection import CHAT, COMPLETIONS, asked, request, words
from tests.support.strange_bytes import strange_message

MIB = 1024 * 1024
USER = [{"role": "user", "content": "hello"}]
ROUTES = (CHAT, COMPLETIONS, "/tokenize", "/detokenize")
Maker = Callable[[random.Random], bytes]


# Bodies that are none.


def broken_json(choice: random.Random) -> bytes:
    """Cut off, of another type, with numbers, texts and keys that are none."""
    bodies = [
        b"", b"{", b"null", b"[]", b'"text"', b"{}", b"\xef\xbb\xbf{}", b'{"prompt": NaN}',
        b'{"prompt": "a", "max_tokens": 1e999}', b'{"prompt": "a", "temperature": -1e308}',
        b'{"prompt": "a", "n": 99999999999999999999999}', b'{"prompt": "a", "n": -1}',
        b'{"prompt": "a", "prompt": ["b"], "seed": 1.5}', b'{"prompt": {"a": 1}}',
        b'{"prompt": [[]]}', b"{}" * 1000,
        b'{"messages": 5}', b'{"messages": [5]}', b'{"messages": [{"role": 5, "content": {}}]}',
        b'{"prompt": "\\ud800"}', b'{"prompt": "a", "stop": [""]}', b'{"tokens": ["a"]}',
        b'{"prompt": "a", "logit_bias": {"x": 1}}', b'{"prompt": "a", "stream": "yes"}',
    ]  # fmt: skip
    return request(choice.choice(bodies), choice.choice(ROUTES))


def bad_utf8(choice: random.Random) -> bytes:
    wrong = choice.choice([b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2"])
    bodies = [
        b'{"prompt": "a%b"}' % wrong,
        b'{"messages": [{"role": "user", "content": "%b"}]}' % wrong,
        b'{"prompt": "a", "%b": 1}' % wrong,
        '{"prompt": "a"}'.encode("utf-16"),
    ]
    return request(choice.choice(bodies), choice.choice(ROUTES))


def wrong_type(choice: random.Random) -> bytes:
    """Content types, encodings and methods that are not taken."""
    headers = [
        "", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Type: multipart/form-data; boundary=x\r\n",
        "Content-Type: application/json\r\nContent-Encoding: br\r\n",
        "Content-Type: application/json\r\nContent-Encoding: gzip\r\n",
        "Content-Type: application/json\r\nTransfer-Encoding: gzip\r\n",
        "Content-Type: application/json\r\nExpect: a miracle\r\n",
    ]  # fmt: skip
    body = json.dumps({"prompt": "a", "max_tokens": 4}).encode()
    method = choice.choice(["POST", "POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
    return request(body, choice.choice(ROUTES), choice.choice(headers), method)


def cross_origin(choice: random.Random) -> bytes:
    """What a page of another origin sends through its reader's browser."""
    body = json.dumps({"messages": USER, "max_tokens": 64}).encode()
    headers = choice.choice(
        [
            "Origin: http://evil.example\r\nContent-Type: text/plain\r\n",
            "Origin: null\r\nContent-Type: application/json\r\n",
            "Sec-Fetch-Site: cross-site\r\nContent-Type: application/json\r\n",
            "Sec-Fetch-Site: same-site\r\nOrigin: http://localhost:1\r\n",
            "Host: evil.example\r\nContent-Type: application/json\r\n",
        ]
    )
    return request(body, CHAT, headers)


def unknown_route(choice: random.Random) -> bytes:
    paths = ["/", "/v1/embeddings", "/../../etc/passwd", "//v1//models//", "/v1/models/%ff%00",
             "/" + "a" * 8000, "/metrics?" + "b" * 4000, "*", "http://evil.example/v1/models",
             "/v1/models/" + "../" * 500]  # fmt: skip
    return request(b"", choice.choice(paths), "", choice.choice(["GET", "HEAD", "OPTIONS"]))


# Bombs.


@functools.cache
def _gzip_bomb() -> bytes:
    """7 GiB of zeros in 7 MiB, in members that are decompressed one after the other."""
    return gzip.compress(bytes(16 * MIB)) * 440


@functools.cache
def _large_gzip() -> bytes:
    """8 MiB of healthy JSON, 60 KiB on the way, to be read and refused as too long."""
    return gzip.compress(b'{"prompt": "' + b"one two " * (MIB - 100) + b'"}')


def gzip_bomb(choice: random.Random) -> bytes:
    body = choice.choice([_gzip_bomb, _large_gzip])()
    headers = "Content-Type: application/json\r\nContent-Encoding: gzip\r\n"
    return request(body, choice.choice(ROUTES), headers)


def json_bomb(choice: random.Random) -> bytes:
    """Brackets in brackets, fields without number, one name again and again."""
    start, one, closing = choice.choice(
        [
            (b'{"prompt": ', b"[", b""),
            (b'{"prompt": ', b'[{"b":', b""),
            (b'{"messages": ', b"[", b"]"),
            (b'{"prompt": "a", "metadata": ', b"[", b"]"),
            (b'{"prompt": "a", "metadata": ', b'{"a":', b"}"),
            (b'{"prompt": "a"', b', "stop": null', b""),
            (b'{"prompt": "a", "max_tokens": 9', b"9", b""),
        ]
    )
    number = choice.choice([100_000, 7 * MIB]) // len(one + closing)
    body = start + one * number + closing * number + b"}"
    return request(body, choice.choice(ROUTES))


@functools.cache
def _many_fields() -> bytes:
    return b'{"prompt": "a"' + b"".join(b', "%d": 0' % n for n in range(600_000)) + b"}"


def unknown_fields(choice: random.Random) -> bytes:
    return request(_many_fields(), choice.choice(ROUTES))


def template_bomb(choice: random.Random) -> bytes:
    """Conversations and variables that are costly to render."""
    many = [{"role": choice.choice(["user", "assistant"]), "content": "a"} for _ in range(50_000)]
    parts = [{"type": "text", "text": "a"}] * 50_000
    deep: object = "a"
    for _ in range(choice.choice([50, 400])):
        deep = {"a": [deep]}
    messages, extra = choice.choice(
        [
            (many, {}),
            ([{"role": "user", "content": parts}], {}),
            ([{"role": "user", "content": "x" * 4 * MIB}], {}),
            (USER, {"chat_template_kwargs": {"messages": many[:1000], "a" * 1000: deep}}),
            (USER, {"chat_template_kwargs": {str(n): n for n in range(100_000)}}),
            (USER, {"chat_template": "{% for a in range(99999999) %}{% endfor %}"}),
            ([{"role": "assistant", "tool_calls": [{"function": deep}]}], {}),
        ]
    )
    return asked(CHAT, messages=messages, max_tokens=1, **extra)


def huge_tools(choice: random.Random) -> bytes:
    parameters: dict[str, object] = {"type": "object", "properties": {"a": {"type": "string"}}}
    for _ in range(choice.choice([1, 60])):
        parameters = {"type": "object", "properties": {"a": parameters}}
    number = choice.choice([128, 1000, 8000])
    size = 1 if number == 128 else 200
    tools = [
        {"type": "function", "function": {"name": f"f{n}", "description": "d" * size}}
        for n in range(number)
    ]
    tools[0]["function"]["parameters"] = parameters  # type: ignore[index]
    return asked(CHAT, messages=USER, tools=tools, max_tokens=1)


# What is allowed, and heavy.


def long_prompt(choice: random.Random) -> bytes:
    number = choice.choice([2000, 4000, 7000])
    return asked(prompt=words(choice, number), max_tokens=4)


def too_long_prompt(choice: random.Random) -> bytes:
    """Beyond the context; some so far that counting their tokens would take long."""
    number = choice.choice([9_000, 100_000, 900_000])
    return asked(choice.choice([COMPLETIONS, "/tokenize"]), prompt=words(choice, number))


def prompt_logprobs(choice: random.Random) -> bytes:
    number, n = choice.choice([(3000, 1), (1000, 64), (500, 16)])
    prompt = words(choice, number)
    return asked(prompt=prompt, max_tokens=1, prompt_logprobs=20, n=n, temperature=1)


def many_answers(choice: random.Random) -> bytes:
    return asked(prompt="Once", n=64, max_tokens=choice.randint(1, 24), temperature=1.0)


def batch(choice: random.Random) -> bytes:
    texts: list[object] = [words(choice, choice.randint(1, 20)) for _ in range(256)]
    ids: list[object] = [[choice.randrange(49_000) for _ in range(10)] for _ in range(256)]
    number = choice.choice([64, 256, 257, 20_000])
    prompts = (choice.choice([texts, ids]) * (number // 256 + 1))[:number]
    return asked(prompt=prompts, max_tokens=2, n=choice.choice([1, 1, 64]))


def unknown_ids(choice: random.Random) -> bytes:
    wrong = choice.choice([49_152, 10**6, 2**31, 2**32 - 1, 2**63, 2**64, -1, 1.5, True])
    body = choice.choice(
        [
            {"prompt": [1, 2, wrong]},
            {"prompt": [[1], [wrong]]},
            {"prompt": "a", "logit_bias": {str(wrong): 5}},
            {"prompt": "a", "stop_token_ids": [wrong]},
        ]
    )
    return asked(max_tokens=2, **body)


def odd_sampling(choice: random.Random) -> bytes:
    """Each at an end of its range, in any combination; some beyond."""
    fields = {
        "temperature": [0, 1e-30, 2, 1e30], "top_p": [0, 1e-12, 1], "top_k": [-1, 1, 2**31],
        "min_p": [0, 1, 2], "presence_penalty": [-2, 2, 1e9], "frequency_penalty": [-2, 2],
        "repetition_penalty": [1e-9, 1, 1e9], "seed": [0, -1, 2**63, 2**64],
        "logit_bias": [{str(n): -100 for n in range(1024)}, {"0": 100}, {"0": 1e300}],
        "stop": [["a" * 1000] * 16, ["\n"], "\0"], "min_tokens": [0, 30, 10**9],
        "logprobs": [5, 20, 999],
        "priority": [-(2**31), 2**31, 2**80], "echo": [True], "stream": [True],
    }  # fmt: skip
    some = choice.sample(sorted(fields), choice.randint(2, 8))
    body = {name: choice.choice(fields[name]) for name in some}  # type: ignore[arg-type]
    return asked(prompt="Once upon", max_tokens=8, **body)


def tokenizing(choice: random.Random) -> bytes:
    ids = [choice.randrange(49_000) for _ in range(2000)] * choice.choice([1, 500, 600])
    text = choice.choice(["\U0001f468‍" * 1000, "a" * 400_000, "　 \t" * 10_000, "0" * 60_000])
    bodies = [("/detokenize", {"tokens": ids}), ("/tokenize", {"prompt": text})]
    path, fields = choice.choice(bodies)
    return asked(path, **fields)  # type: ignore[arg-type]


def not_http(choice: random.Random) -> bytes:
    """Other protocols, and chance."""
    return choice.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + choice.randbytes(500),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + choice.randbytes(50),
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            b"GET /\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
            b"GET / HTTP/1.1\r\nA: " + b"c" * 100_000 + b"\r\n\r\n",
            strange_message(choice),
            choice.randbytes(3000),
        ]
    )


# Seconds between two of each kind, on a machine of two cores that computes the honest streams too.
ONE_REQUEST: dict[Maker, float] = {
    broken_json: 0.5,
    bad_utf8: 1.0,
    wrong_type: 1.0,
    cross_origin: 1.0,
    unknown_route: 1.0,
    not_http: 0.7,
    unknown_ids: 1.0,
    odd_sampling: 2.0,
    gzip_bomb: 12.0,
    json_bomb: 8.0,
    unknown_fields: 30.0,
    template_bomb: 15.0,
    huge_tools: 12.0,
    tokenizing: 10.0,
    too_long_prompt: 12.0,
    long_prompt: 25.0,
    prompt_logprobs: 60.0,
    many_answers: 40.0,
    batch: 30.0,
}
