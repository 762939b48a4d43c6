"""Fields of OpenAI's API and of other servers that this server does not have, or does not follow.

Clients of many servers send fields of all of them; `core.frontend.fields` says what becomes of
those.
"""

from core.frontend.fields import FieldRules
from plugins.frontends._openai.protocol import IGNORED, WITHOUT_EFFECT, StreamOptions

_FORMAT = "the answer would not be in the form that is asked for"
_PROMPT = "write what it says into the messages or the prompt"
REFUSED = {  # field -> why, and what to do instead
    # Structured output: vLLM's names, SGLang's, llama.cpp's.
    "structured_outputs": _FORMAT, "guided_json": _FORMAT, "guided_regex": _FORMAT,
    "guided_choice": _FORMAT, "guided_grammar": _FORMAT, "structural_tag": _FORMAT,
    "regex": _FORMAT, "ebnf": _FORMAT, "json_schema": _FORMAT, "grammar": _FORMAT,
    # What may be generated, and where it ends.
    "bad_words": "use logit_bias with -100 for single tokens",
    "stop_regex": "use stop, with strings",
    "custom_logit_processor": "name one that a plugin registers in logits_processors",
    "use_beam_search": "answers are sampled; use n",
    # What the answer follows.
    "chat_template": "a request never brings a template; the checkpoint's is used",
    "documents": "give them in chat_template_kwargs where the template reads them, or in messages",
    "session_params": _PROMPT,
    "truncate_prompt_tokens": "shorten the prompt; /tokenize counts its tokens",
    "input_ids": "send them as prompt to /v1/completions",
    "input_embeds": "send text or token ids", "prompt_embeds": "send text or token ids",
    # Another model, and who may share a cache.
    "lora_path": "this server has no adapters", "lora": "this server has no adapters",
    "cache_salt": "the prefix cache is shared; engine.disable_prefix_cache=true turns it off",
}  # fmt: skip

ALL = FieldRules(refused=REFUSED)  # of every route
OF_GENERATION = FieldRules(
    without_effect=WITHOUT_EFFECT,
    reported=IGNORED,
    refused=REFUSED,
    objects={"stream_options": StreamOptions},
)
