"""Greedy decoding and prompt logprobs by transformers: the oracle of whole models, as shipped."""

from core.testing.model import TransformersOracle as TransformersOracle
