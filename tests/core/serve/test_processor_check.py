"""What requests may ask of logits processors."""

from dataclasses import dataclass

import pytest

from core.errors import RequestError
from core.serve.processor_check import MAX_BYTES, check_processors


@dataclass
class Bias:
    by_id: dict[int, float]
    most: int = 3

    def __post_init__(self) -> None:
        if len(self.by_id) > self.most:
            raise ValueError(f"at most {self.most} tokens")


class Kind:
    params = Bias
    needs_whole_rows = False
    is_mask = False

    def check(self, params: Bias, vocab_size: int) -> None:
        if any(not 0 <= token < vocab_size for token in params.by_id):
            raise ValueError(f"by_id holds an id outside 0 to {vocab_size - 1}")

    def build(self, spec):
        raise AssertionError("nothing is built where requests are admitted")


def check(asked, kinds=None) -> None:
    check_processors(asked, {"bias": Kind()} if kinds is None else kinds, 10)


@pytest.mark.parametrize("by_id", [{"7": 1.5}, {7: 1}, {}])
def test_keys_of_json_are_read_as_their_types(by_id) -> None:
    check({"bias": {"by_id": by_id}})
    check({})


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"bais": {}}, "logits_processors", "no logits processor 'bais'; this server has: bias"),
        ({"bias": {}}, "logits_processors.bias", "by_id"),
        ({"bias": {"by_id": {"7": "much"}}}, "logits_processors.bias", "float"),
        ({"bias": {"by_id": {"x": 1.0}}}, "logits_processors.bias", "int"),
        ({"bias": {"by_id": {"10": 1.0}}}, "logits_processors.bias", "outside 0 to 9"),
        ({"bias": {"by_id": {"1": 0, "2": 0}, "most": 1}}, "logits_processors.bias", "at most 1"),
        ({"bias": []}, "logits_processors", "object of objects"),
        ([], "logits_processors", "object of objects"),
        ({"bias": {"by_id": {}, "x": object()}}, "logits_processors", "can't be sent"),
        ({"bias": {"by_id": {}, "x": 2**70}}, "logits_processors", "can't be sent"),
        ({"bias": {"by_id": {}, "x": "a" * MAX_BYTES}}, "logits_processors", "allowed: 0 to"),
    ],
)
def test_what_is_wrong_is_named(asked, param, says) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        check(asked)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_a_server_without_processors_says_so() -> None:
    with pytest.raises(RequestError, match="this server has: none"):
        check({"bias": {}}, {})
