"""The processor as it is known where requests are admitted: it imports no torch."""

from acme_sampling.params import NgramParams
from core.interfaces.sampling import LogitsProcessor, ProcessorSpec
from core.plugin.hookspecs import NoOptions
from core.settings.config import AppConfig


class NoRepeatNgram:
    """No `size` tokens in a row come twice, in the prompt and the answer together."""

    params = NgramParams
    needs_whole_rows = False  # what is done to a token's logit depends on no other logit
    is_mask = True  # applied after all that only changes logits

    def check(self, params: NgramParams, vocab_size: int) -> None:
        """Nothing that fits `NgramParams` is wrong for some model."""

    def build(self, spec: ProcessorSpec) -> LogitsProcessor:
        """Imported in the processes that compute, which have torch."""
        from acme_sampling.on_device import NgramMask

        return NgramMask()


def no_repeat_ngram(options: NoOptions, config: AppConfig) -> NoRepeatNgram:
    """The factory that the plugin registers."""
    return NoRepeatNgram()
