"""Plain values into dataclasses: every type, every mistake, and the way back."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from core.errors import ConfigError
from core.settings.schema import build, defaults, did_you_mean, knobs


@dataclass(slots=True, kw_only=True)
class Inner:
    size: int
    share: float = 0.5


@dataclass(slots=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=lambda: Inner(size=1))
    maybe: Inner | None = None
    limit: int | None = None
    mode: Literal["fast", "exact"] = "fast"
    words: list[str] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    flag: bool = False

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("a name must not be bad")


def test_nested_values_become_dataclasses():
    built = build(
        Outer,
        {
            "name": "x",
            "inner": {"size": 3, "share": 1},
            "maybe": {"size": 4},
            "limit": None,
            "mode": "exact",
            "words": ["a", "b"],
            "free": {"anything": [1, None]},
            "flag": True,
        },
    )
    assert built == Outer(
        name="x",
        inner=Inner(size=3, share=1.0),
        maybe=Inner(size=4),
        mode="exact",
        words=["a", "b"],
        free={"anything": [1, None]},
        flag=True,
    )
    assert type(built.inner.share) is float


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"nmae": "x"}, ["unknown key 'o.nmae'", "did you mean 'name'?", "keys of o: name, inner"]),
        ({"name": "x", "inner": {"sise": 1}}, ["'o.inner.sise'", "'size'", "size, share"]),
        ({"name": "x", "maybe": {"sise": 1}}, ["'o.maybe.sise'", "size, share"]),
        ({}, ["o.name is not set", "text"]),
        ({"name": "x", "maybe": {}}, ["o.maybe.size is not set", "an integer"]),
        ({"name": 5}, ["o.name=5", "expected text", "'o.name=\"5\"'"]),
        ({"name": "x", "inner": 3}, ["o.inner=3", "a section with the keys size, share"]),
        ({"name": "x", "inner": {"size": "3"}}, ["o.inner.size='3'", "expected an integer"]),
        ({"name": "x", "inner": {"size": True}}, ["o.inner.size=True", "an integer"]),
        ({"name": "x", "inner": {"size": 2.0}}, ["o.inner.size=2.0", "an integer"]),
        ({"name": "x", "inner": {"size": None}}, ["o.inner.size=null", "an integer"]),
        ({"name": "x", "limit": "many"}, ["o.limit='many'", "an integer or null"]),
        ({"name": "x", "mode": "slow"}, ["o.mode='slow'", "one of fast, exact"]),
        ({"name": "x", "words": "a"}, ["o.words='a'", "a list of text"]),
        ({"name": "x", "words": ["a", 2]}, ["o.words[1]=2", "expected text"]),
        ({"name": "x", "flag": 1}, ["o.flag=1", "true or false"]),
        ({"name": "x", "free": [1]}, ["o.free=[1]", "a section"]),
        ({"name": "bad"}, ["o: a name must not be bad"]),
    ],
)
def test_mistakes_are_named_in_full(values, fragments):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values, "o")
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_defaults_leave_out_what_is_required():
    assert defaults(Outer) == {
        "inner": {"share": 0.5},
        "maybe": None,
        "limit": None,
        "mode": "fast",
        "words": [],
        "free": {},
        "flag": False,
    }


def test_knobs_list_every_settable_key_once():
    found = {knob.key: knob for knob in knobs(Outer)}
    assert list(found) == [
        "name",
        "inner.size",
        "inner.share",
        "maybe.size",
        "maybe.share",
        "limit",
        "mode",
        "words",
        "free",
        "flag",
    ]
    assert found["name"].required
    assert not found["limit"].required
    assert found["inner.share"].default == 0.5
    assert found["limit"].type == "an integer or null"


def test_did_you_mean_says_nothing_without_a_close_word():
    assert did_you_mean("zzz", ["alpha", "beta"]) == ""
    assert did_you_mean("alpa", ["alpha", "beta"]) == "; did you mean 'alpha'?"
