"""What every route needs: the context, and what leads from prompts to answers that can be run.

Knows nothing of HTTP.
"""

from collections.abc import Sequence
from functools import partial

import msgspec

from core.frontend.answer import Answer
from core.frontend.fields import SamplingFields
from core.frontend.generation import Choice, make_choices
from core.frontend.limits import answer_tokens, check_prompt_length, check_range, context_too_long
from core.frontend.sampling import check_sampling, sampling_params, stop_strings
from core.interfaces.frontend import FrontendContext
from core.interfaces.messages import SamplingParams
from core.interfaces.text import ChatText, Prompt, PromptTexts


class Service:
    """The frontend's context, and what is computed from it."""

    def __init__(self, context: FrontendContext) -> None:
        self.context = context
        self.engine = context.engine
        self.tokenizer = context.tokenizer
        self.model = context.model
        self.config = context.config
        self.metrics = context.metrics
        self.admission = context.admission

    async def chat_ids(self, job: ChatText) -> list[int]:
        """The tokens of a conversation, of a length that the model takes."""
        return self._checked(await self.context.text.chat(job), "messages").ids

    async def prompts(self, job: PromptTexts) -> list[Prompt]:
        """The prompts of a body, each of a length that the model takes."""
        found = await self.context.text.prompts(job)
        return [self._checked(prompt, "prompt") for prompt in found]

    async def choices(
        self,
        body: SamplingFields,
        prompt: bytes,
        *,
        default_max_tokens: int | None,
        max_prompts: int = 1,
        n: int = 1,
    ) -> list[Choice]:
        """`n` answers of text to each prompt of a body, checked and ready to be run. `prompt` is
        JSON: a text, token ids, or several of either, up to `max_prompts`. `default_max_tokens`
        None: the rest of the context.

        Raises RequestError: 400 for what is out of range, 429 where the queue is full.
        """
        job = PromptTexts(
            prompt=prompt,
            vocab_size=self.model.vocab_size,
            max_prompts=max_prompts,
            max_tokens=self.model.max_model_len - 1,
        )
        stops = self._check(body, n)
        with self.admission.tokenizing(n):
            prompts = await self.prompts(job)
        return self._choices(body, prompts, stops, default_max_tokens, n)

    async def chat_choices(
        self, body: SamplingFields, chat: ChatText, *, default_max_tokens: int | None, n: int = 1
    ) -> list[Choice]:
        """The same for a conversation; its `max_tokens` is set here."""
        chat = msgspec.structs.replace(chat, max_tokens=self.model.max_model_len - 1)
        stops = self._check(body, n)
        with self.admission.tokenizing(n):
            ids = await self.chat_ids(chat)
        prompts = [Prompt(num_tokens=len(ids), ids=ids)]
        return self._choices(body, prompts, stops, default_max_tokens, n)

    def _check(self, body: SamplingFields, n: int) -> tuple[str, ...]:
        """What does not depend on the prompt; returns the stop strings."""
        check_sampling(body, self.model)
        check_range("max_tokens", body.max_tokens, 1, float("inf"))
        check_range("n", n, 1, self.config.max_n)
        return stop_strings(body, self.config)

    def _choices(
        self,
        body: SamplingFields,
        prompts: Sequence[Prompt],
        stops: tuple[str, ...],
        default_max_tokens: int | None,
        n: int,
    ) -> list[Choice]:
        def sampling_of(num_prompt: int) -> SamplingParams:
            most = answer_tokens(
                body.max_tokens,
                default_max_tokens,
                num_prompt,
                self.model,
                "max_tokens",
                strict=self.config.strict_fields,
            )
            return sampling_params(body, max_tokens=most, model=self.model)

        def make_answer(prompt: Prompt) -> Answer:
            return Answer(
                self.tokenizer,
                prompt.ids,
                stops=stops,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                min_tokens=body.min_tokens or 0,
                wants_logprobs=False,
                takes_over=prompt.is_open,
            )

        return make_choices(
            [(p.ids, sampling_of(len(p.ids)), partial(make_answer, p)) for p in prompts],
            n,
            priority=body.priority,
        )

    def _checked(self, prompt: Prompt, param: str) -> Prompt:
        if prompt.at_least:
            what = f"the prompt has at least {prompt.num_tokens} tokens"
            raise context_too_long(what, self.model, param)
        check_prompt_length(prompt.num_tokens, self.model, param)
        return prompt
