"""What would run for a model and a policy, and why: nothing in kvpleat falls back silently, so everything can be asked
for.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from kvpleat import accounting
from kvpleat.cache.pages import PagePool
from kvpleat.hf.borrowed import gates_for
from kvpleat.hf.families import describe
from kvpleat.policies.base import Policy
from kvpleat.types import ENTRY_BITS, Delay, KVShape


@dataclass(frozen=True)
class Explanation:
    """Which policy, layers, memory and kernels would serve a model: pairs of topic and answer, in reading order."""

    topics: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The topics, JSON-ready."""
        return dict(self.topics)

    def __str__(self) -> str:
        width = max(map(len, self.topics))
        return "\n".join(f"{topic:<{width}}  {answer}" for topic, answer in self.topics.items())


def explain(model: nn.Module, policy: Policy, *, page_size: int = 16) -> Explanation:
    """Explain without attaching. Raises UnsupportedError where `compress` would."""
    facts = describe(model, page_size)
    policy = gates_for(model, facts, policy)
    facts = facts.stored_with(policy.fields, policy.bits)
    shape = facts.shape
    softcap = any(cap is not None for _, cap in facts.logits)
    pool = PagePool(shape, facts.device)
    coded = shape.bits is not None
    on_cpu = facts.device.type == "cpu"
    reserved = pool.arrays["key"].kind == "reserved"
    side = ", ".join(policy.fields) or "none"
    sliding = f"{len(facts.sliding)} with a sliding window stay as they are, " if facts.sliding else ""
    return Explanation(
        {
            "model": f"{facts.family}, {shape.dtype} on {facts.device}, at most {facts.max_positions:,} positions",
            "layers": f"{sliding}{shape.num_layers} compressed: {shape.num_kv_heads} KV heads x {shape.head_dim} "
            f"channels, {shape.group_size} query heads each",
            "policy": f"{policy!r}: {policy.summary}",
            "guarantees": policy.guarantees,
            "needs": policy.needs,
            "full cache": f"{accounting.human_bytes(accounting.full_bytes(shape, 1))} per token",
            "entries": _stored(shape),
            "page": f"{page_size} entries of one stream, {accounting.human_bytes(pool.page_bytes)}; "
            f"side arrays: {side}",
            "pool": "address space reserved, memory backed as it is written and given back by trim()"
            if reserved
            else "grows and shrinks by copying (reserving address space needs Linux and a CPU)",
            "keys": "moved to the position they merge into (rotary embedding)"
            if facts.rotary
            else "merged as they are (no rotary)",
            **({} if policy.delayed is None else {"leaving": _leaving(policy.delayed)}),
            "prefill": "reference kernel, in float32 (SDPA knows no logit soft cap)"
            if softcap
            else "torch SDPA in blocks of queries"
            + ("" if policy.delayed is None else ", over what stays and what is young"),
            "decode": (
                "CPU kernel over pages in place, one stream after the other" if on_cpu else "gathered pages, torch SDPA"
            )
            + (", numbers made of codes in blocks" if coded and on_cpu else ""),
        }
    )


def _stored(shape: KVShape) -> str:
    """How entries are stored, in words."""
    size = f"{accounting.entry_bytes(shape):,} bytes with side arrays, {accounting.full_entry_bytes(shape):,} in full"
    if shape.bits is None:
        return f"as the model computes them: {size}"
    keys, values = ENTRY_BITS[shape.bits]
    return (
        f"{shape.bits} bits a number (keys {keys}, values {values}), a scale and a zero each for a key and a value, "
        f"quantised once, when appended: {size}"
    )


def _leaving(delay: Delay) -> str:
    """What becomes of marked entries, and when, in words."""
    when = f"once they are {delay.tokens} tokens old" if delay.tokens else "at once"
    newest = f", whose newest {delay.look_back} members count" if delay.look_back else ""
    merged = f"merge into the entries after them{newest}" if delay.merges else "are evicted"
    return f"gates mark entries, which {merged} {when}; a token that comes then is written in their place"
