"""What every route needs: the context, and prompts to tokens of a length that the model takes.

Knows nothing of HTTP.
"""

from core.frontend.limits import check_prompt_length, context_too_long
from core.interfaces.frontend import FrontendContext
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

    def _checked(self, prompt: Prompt, param: str) -> Prompt:
        if prompt.at_least:
            what = f"the prompt has at least {prompt.num_tokens} tokens"
            raise context_too_long(what, self.model, param)
        check_prompt_length(prompt.num_tokens, self.model, param)
        return prompt
