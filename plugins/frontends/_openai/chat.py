"""POST /v1/chat/completions. Knows nothing of engines or of sockets."""

import time
from typing import Any

import msgspec

from core.errors import RequestError
from core.frontend.answer import Answer, Piece
from core.frontend.asgi import Call
from core.frontend.endpoint import new_id
from core.frontend.generation import Choice, make_choices, num_logprobs
from core.frontend.limits import answer_tokens, check_range
from core.frontend.sampling import sampling_params, stop_strings
from core.interfaces.text import ChatText
from plugins.frontends._openai.endpoint import GenerationEndpoint, usage
from plugins.frontends._openai.large_json import send_large_json
from plugins.frontends._openai.limits import check_generation
from plugins.frontends._openai.logprobs import chat_logprobs, prompt_logprobs
from plugins.frontends._openai.protocol import NULL, ChatRequest, TokenizeRequest
from plugins.frontends._openai.streaming import EventStream, TextShape


class ChatCompletions(GenerationEndpoint[ChatRequest]):
    """A conversation in, the assistant's next message out."""

    route = "/v1/chat/completions"
    body_type = ChatRequest
    prompt_param = "messages"

    async def handle(self, body: ChatRequest, call: Call) -> None:
        self._check(body)
        choices = await self._choices(body)
        if body.stream:
            await self._answer_streamed(body, choices, call)
        else:
            await self._answer(body, choices, call)

    def _check(self, body: ChatRequest) -> None:
        config = self.service.config
        check_generation(body, config, self.service.model)
        check_range("max_tokens", body.max_tokens, 1, float("inf"))
        check_range("max_completion_tokens", body.max_completion_tokens, 1, float("inf"))
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        check_range("top_logprobs", body.top_logprobs, 0, config.max_logprobs)
        if body.response_format is not None and body.response_format.get("type") != "text":
            raise RequestError(
                'response_format other than {"type": "text"} is not supported yet',
                param="response_format",
                code="unsupported",
            )
        if body.tool_choice not in (None, "auto", "none"):
            raise RequestError(
                "tool_choice other than auto and none is not supported yet",
                param="tool_choice",
                code="unsupported",
            )
        if body.modalities not in (None, ["text"]):
            raise RequestError(
                "this model answers with text only", param="modalities", code="unsupported"
            )

    async def _choices(self, body: ChatRequest) -> list[Choice]:
        service = self.service
        with service.admission.tokenizing(body.n or 1):
            prompt_ids = await service.chat_ids(
                chat_text(
                    body,
                    tools=NULL if body.tool_choice == "none" else body.tools,
                    functions=NULL if body.tool_choice == "none" else body.functions,
                    reasoning_effort=body.reasoning_effort,
                    max_tokens=service.model.max_model_len - 1,
                )
            )
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(body, param)
        sampling = sampling_params(
            body,
            max_tokens=answer_tokens(
                asked,
                None,
                len(prompt_ids),
                service.model,
                param,
                strict=service.config.strict_fields,
            ),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            model=service.model,
        )
        stops = stop_strings(body, service.config)

        def make_answer() -> Answer:
            return Answer(
                service.tokenizer,
                prompt_ids,
                stops=stops,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                min_tokens=sampling.min_tokens,
                wants_logprobs=bool(body.logprobs),
            )

        return make_choices(
            [(prompt_ids, sampling, make_answer)],
            body.n or 1,
            priority=body.priority,
            prompt_logprobs_once=True,
        )

    async def _answer(self, body: ChatRequest, choices: list[Choice], call: Call) -> None:
        request_id, created = new_id("chatcmpl"), int(time.time())
        seen = await self.collect(request_id, choices, call)

        def build() -> dict[str, Any]:
            response = {
                "id": request_id,
                "object": "chat.completion",
                "created": created,
                "model": self.service.model.name,
                "choices": [self._choice(body, choice, seen[choice.index]) for choice in choices],
                "usage": usage(choices, len(choices)),
            }
            if body.prompt_logprobs is not None:
                response["prompt_logprobs"] = prompt_logprobs(
                    self.service.tokenizer, choices[0].answer.prompt_logprobs
                )
            return response

        await send_large_json(call.send, num_logprobs(choices), build)

    def _choice(self, body: ChatRequest, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(body, pieces),
            "finish_reason": choice.answer.finish_reason,
            "stop_reason": choice.answer.stop_reason,
        }

    def _logprobs(self, body: ChatRequest, pieces: list[Piece]) -> dict[str, Any] | None:
        if not body.logprobs:
            return None
        entries = [entry for piece in pieces for entry in piece.logprobs]
        return chat_logprobs(self.service.tokenizer, entries, body.top_logprobs or 0)

    async def _answer_streamed(self, body: ChatRequest, choices: list[Choice], call: Call) -> None:
        request_id = new_id("chatcmpl")
        envelope = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self.service.model.name,
        }
        events = EventStream(call.send, envelope, body.stream_options)
        shapes: list[TextShape | None] = [None] * len(choices)
        plain = not body.logprobs and not events.usage_in_all

        async def on_pieces(choice: Choice, pieces: list[Piece]) -> None:
            chunk = b""
            shape = shapes[choice.index]
            if shape is None:
                shape = events.text_shape(choice.index, b'"delta":{"content":', b"}")
                shapes[choice.index] = shape
                delta = {"role": "assistant", "content": ""}
                chunk = events.event(_chunk(choice.index, delta), usage([choice]))
            if plain:
                chunk += shape.plain([piece.text for piece in pieces])
            else:
                so_far = usage([choice]) if events.usage_in_all else None
                for piece in pieces:
                    chunk += shape.full(piece.text, self._logprobs(body, [piece]), so_far)
            if choice.answer.finish_reason is not None:
                last = _chunk(choice.index, {}, choice.answer)
                chunk += events.event(last, usage([choice]))
            await events.write(chunk)

        await self.stream(request_id, choices, call, events, on_pieces, len(choices))


def chat_text(
    body: ChatRequest | TokenizeRequest,
    *,
    tools: msgspec.Raw,
    functions: msgspec.Raw = NULL,
    reasoning_effort: str | None = None,
    max_tokens: int,
) -> ChatText:
    """What has to be rendered for a body."""
    continue_final = bool(body.continue_final_message)
    add_prompt = body.add_generation_prompt
    return ChatText(
        messages=bytes(body.messages),
        tools=bytes(tools),
        functions=bytes(functions),
        variables=bytes(body.chat_template_kwargs),
        defaults={} if reasoning_effort is None else {"reasoning_effort": reasoning_effort},
        add_generation_prompt=not continue_final if add_prompt is None else add_prompt,
        continue_final_message=continue_final,
        add_special_tokens=bool(body.add_special_tokens),
        max_tokens=max_tokens,
    )


def _chunk(index: int, delta: dict[str, Any], answer: Answer | None = None) -> dict[str, Any]:
    chunk = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    if answer is not None:
        chunk["finish_reason"] = answer.finish_reason
        chunk["stop_reason"] = answer.stop_reason
    return chunk
