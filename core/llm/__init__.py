"""The offline Python API: `from core import LLM`."""
