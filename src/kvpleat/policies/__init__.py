"""Policies: what to keep, merge and evict. Add one by writing a frozen dataclass and naming it in `registry`."""

from typing import Any

from kvpleat.errors import OptionError
from kvpleat.policies.attention import AttentionScore
from kvpleat.policies.base import LayerScores, Policy
from kvpleat.policies.encoder import EncoderMerge
from kvpleat.policies.full import Full
from kvpleat.policies.gates import GateConfig, Gates, shipped
from kvpleat.policies.learned import DMC, DMS, Fold
from kvpleat.policies.window import Window

__all__ = [
    "DMC",
    "DMS",
    "AttentionScore",
    "EncoderMerge",
    "Fold",
    "Full",
    "GateConfig",
    "Gates",
    "LayerScores",
    "Policy",
    "Window",
    "from_dict",
    "registry",
    "shipped",
]


def registry() -> dict[str, type[Policy]]:
    """All policies of causal LMs by name. EncoderMerge, which decides about no cache, is none of them."""
    return {policy.name: policy for policy in (Full, Window, AttentionScore, DMS, Fold, DMC)}


def from_dict(options: dict[str, Any]) -> Policy:
    """The policy that `Policy.to_dict` described. Unknown names and options are errors."""
    options = dict(options)
    name = options.pop("name", None)
    if name not in registry():
        raise OptionError(f"policy {name!r} is not known. Known policies: {', '.join(registry())}.")
    try:
        return registry()[name](**options)
    except TypeError as error:
        raise OptionError(f"policy {name!r} does not take these options: {error}. See `kvpleat policies`.") from None
