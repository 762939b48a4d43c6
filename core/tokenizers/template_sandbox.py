"""The jinja2 environment that chat templates run in: the sandbox and names that transformers gives
them. Knows nothing of messages.

See transformers/utils/chat_template_utils.py for the options, filters, globals and tags.
"""

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateLimit(Exception):
    """A template ran too long or grew too large. Not a jinja2 error: templates can't catch it."""


class _Limits(threading.local):
    """CPU time and size left to the rendering under way in this thread.

    Counted where a template loops or calls. What it does in between (a filter over a large list, a
    power, a product) is for the process around it to bound: see core.serve.text.process."""

    def __init__(self, deadline_s: float, max_characters: int) -> None:
        self.deadline_s = deadline_s
        self.max_characters = max_characters
        self.ends_at = float("inf")
        self.characters = 0

    def __enter__(self) -> None:
        self.ends_at = time.thread_time() + self.deadline_s
        self.characters = 0

    def __exit__(self, *_: object) -> None:
        self.ends_at = float("inf")

    def step(self, characters: int = 0) -> str:
        self.characters += characters
        if self.characters > self.max_characters:
            raise TemplateLimit(f"made more than {self.max_characters} characters")
        if time.thread_time() > self.ends_at:
            raise TemplateLimit(f"took more than {self.deadline_s} s of CPU time")
        return ""

    def check_size(self, size: int) -> None:
        if size > self.max_characters:
            raise TemplateLimit(f"made a value of more than {self.max_characters} elements")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, plus limits."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self, deadline_s: float, max_characters: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self.limits = _Limits(deadline_s, max_characters)
        self.count_step: Callable[[], str] = self.limits.step
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _dict

    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        """Compile with a counted step at the start of every loop body, and `~` as a checked call.

        Macros need none: calling one is a counted step.
        """
        _Counting().visit(source)
        return super()._generate(source, name, filename, defer_init)

    def checked_concat(self, *parts: Any) -> str:
        """What `~` does, within the size limit."""
        texts = [str(part) for part in parts]
        self.limits.check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.limits.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.limits.step()
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        if operator == "+":
            self.limits.check_size(sum(sizes))
        elif operator == "*" and len(sizes) == 1:
            times = next((side for side in (left, right) if isinstance(side, int)), 0)
            self.limits.check_size(sizes[0] * times)
        elif operator == "**" and isinstance(right, int):
            self.limits.check_size(abs(right) * 1024)
        return super().call_binop(context, operator, left, right)


class _Counting(jinja2.visitor.NodeTransformer):
    """Puts the calls that check limits into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        function = nodes.EnvironmentAttribute("checked_concat")
        return nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it
    is its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own annotation)

    def parse(self, parser: Any) -> Any:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be an attribute's name
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("names in a namespace can't begin with _")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
