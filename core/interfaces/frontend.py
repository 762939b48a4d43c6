"""What a frontend plugin gets and fills. Knows nothing of HTTP or of sockets."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.config import FrontendConfig
from core.interfaces.messages import EngineStats, RequestOutput, SamplingParams


class Engine(Protocol):
    """The engine as a frontend sees it, over whatever transport."""

    @property
    def alive(self) -> bool:
        """Whether every worker runs; False for good once one died."""
        ...

    @property
    def num_live(self) -> int:
        """Requests submitted and neither finished nor aborted."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest gauges the engine sent."""
        ...

    def generate(
        self, request_id: str, prompt_ids: list[int], sampling: SamplingParams
    ) -> AsyncIterator[RequestOutput]:
        """Outputs until one has a finish_reason. Closing the iterator early aborts the request.

        Raises WorkerDied where the engine ends before that.
        """
        ...


class IncrementalDetokenizer(Protocol):
    """Text of one answer, token by token."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; a partial UTF-8 character is held back."""
        ...

    def finish(self) -> str:
        """What was held back, with U+FFFD for broken bytes."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back, for one model."""

    vocab_size: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str:
        """The token alone as text, as logprobs report it."""
        ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; encode it without adding special tokens.

        Raises RequestError where the template refuses the messages or there is no template.
        """
        ...

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a frontend may say about the model."""

    name: str
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int
    created: int  # Unix seconds
    info: dict[str, Any]  # plain values, for /server_info
    default_sampling: dict[str, float]  # from generation_config.json: temperature, top_p, top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendContext:
    """All a frontend is built from."""

    engine: Engine
    tokenizer: Tokenizer
    model: ServedModel
    config: FrontendConfig
    max_running_requests: int
    api_key: str | None


FrontendFactory = Callable[[FrontendContext], Any]  # returns an ASGI application
