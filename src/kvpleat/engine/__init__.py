"""The engine: many requests at once over one paged, compressed KV memory, with vLLM's names for what is asked."""

from kvpleat.engine.async_llm import AsyncLLM
from kvpleat.engine.llm import LLM
from kvpleat.engine.params import CompletionOutput, Logprob, RequestOutput, RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]
