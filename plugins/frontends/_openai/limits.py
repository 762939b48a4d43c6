"""What a request may ask for beyond sampling: the model, answers, options of streams.

Knows nothing of HTTP. Each RequestError names the parameter and what is allowed.
"""

from core.errors import RequestError
from core.frontend.limits import check_range
from core.frontend.sampling import check_sampling
from core.interfaces.frontend import ServedModel
from core.settings.config import FrontendConfig
from plugins.frontends._openai.protocol import Generation


def check_model(name: str | None, model: ServedModel) -> None:
    """Raise 404 unless the request names the model that is served, or none."""
    if name is not None and name != model.name:
        raise RequestError(
            f"the model {name[:64]!r} does not exist; this server has {model.name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_generation(body: Generation, config: FrontendConfig, model: ServedModel) -> None:
    """The checks that don't depend on the prompt."""
    check_model(body.model, model)
    check_sampling(body, model)
    check_range("n", body.n, 1, config.max_n)
    check_range("prompt_logprobs", body.prompt_logprobs, 0, config.max_logprobs)
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options is allowed only with stream=true", param="stream_options"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs can't be streamed", param="prompt_logprobs")
