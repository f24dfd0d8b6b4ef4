"""One forward of an encoder: its tokens, how many of them enter each layer, and what is left to tell afterwards."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvpleat.encoder.families import Encoder, special_tokens
from kvpleat.encoder.tokens import Tokens, shorten
from kvpleat.errors import UnsupportedError
from kvpleat.kernels.grouping import picked, squares
from kvpleat.policies.encoder import EncoderMerge


@dataclass(frozen=True)
class Trace:
    """What became of the tokens of one forward.

    Args:
        places: for each layer [B, T] int64: the group that each token of the input is in while the layer runs, counted
            in text order; -1 for padding. Tokens of one group are one token there.
        counts: for each layer the tokens of each row.
        lengths: tokens of each row of the input.
    """

    places: list[Tensor]
    counts: list[list[int]]
    lengths: list[int]

    @property
    def ratio(self) -> float:
        """Tokens x layers of the full model over those that ran."""
        return len(self.counts) * sum(self.lengths) / sum(map(sum, self.counts))


@dataclass(frozen=True)
class Longer:
    """The tokens of a layer before they merged, which its keys and values come from.

    Args:
        tokens: as they were. states: [B, T, C]. place: [B, T] where each of them is now.
    """

    tokens: Tokens
    states: Tensor
    place: Tensor


@dataclass
class Call:
    """One forward. Travels through the model as a keyword argument, so that a model in two threads is no problem.

    Args:
        policy: decides.
        real: [B, T] bool, columns of the input that are no padding. lengths: how many each row has.
        tokens: what the layers work on now.
        place: [B, T] the token that each column of the input is now; of padding: 0.
        kept: for each layer before (or for what="kv": in) which tokens merge, those that each row is to keep; empty
            for coverage.
        layer: the one that runs.
        longer: set while a layer runs whose keys come from the tokens before they merged.
        made: see `once`.
    """

    policy: EncoderMerge
    real: Tensor
    lengths: list[int]
    tokens: Tokens
    place: Tensor
    kept: list[list[int]]
    layer: int = 0
    longer: Longer | None = None
    places: list[Tensor] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    made: dict[Hashable, Any] = field(default_factory=dict)

    def enter(self, layer: int, states: Tensor, keys_from_longer: bool) -> Tensor:
        """Merge before a layer, if that is due: [B, T, C] -> [B, W, C]."""
        self.layer, self.longer = layer, None
        if self.merges_before(layer):
            tokens = self.tokens
            if layer == 0 and self.policy.coverage is not None:
                whole = torch.where(tokens.free, tokens.mass, 0).sum(1)
                tokens = replace(tokens, budget=whole * (1.0 - self.policy.coverage))
            kept = self.kept[layer] if self.kept else [self.policy.kept(n, 0.0) for n in tokens.counts]
            fewer, short, place = shorten(tokens, states, self.policy, kept)
            if fewer is not tokens:
                self.longer = Longer(self.tokens, states, place) if keys_from_longer else None
                self.place = place if tokens.plain else place.gather(1, self.place)
                self.tokens, states, self.made = fewer, short, {}
        self.places.append(self.once("places", lambda: torch.where(self.real, self.place, -1)))
        self.counts.append(self.tokens.counts)
        return states

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What all layers ask for until tokens merge again, made for the first one."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def merges_before(self, layer: int) -> bool:
        """Whether the policy merges tokens before a layer."""
        return self.policy.what == "tokens" and layer < self.policy.steps

    def observe(self, mass: Tensor) -> None:
        """Take [B, T] as the importance of the keys of the running layer."""
        if self.longer is not None:
            mass = torch.zeros_like(self.tokens.mass).scatter_add_(1, self.longer.place, mass)
        self.tokens = replace(self.tokens, mass=mass)

    def rotations(self, table: Tensor) -> Tensor:
        """[1 or B, T, D] -> [B, W, D]: rotary embeddings of the tokens that are left, each where it stood."""
        whole = table.expand(self.real.shape[0], -1, -1)
        rotated: Tensor  # beside its table, so that no other table has that id
        rotated, _ = self.once(("rotations", id(table)), lambda: (picked(whole, self.tokens.position), table))
        return rotated

    @property
    def trace(self) -> Trace:
        """What has become of the tokens."""
        return Trace(self.places, self.counts, self.lengths)


def plan(encoder: Encoder, policy: EncoderMerge, kwargs: dict[str, Any]) -> Call:
    """The call that a forward's arguments ask for. Raises UnsupportedError for what merged tokens cannot give."""
    ids, embedded = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    _refuse(encoder, kwargs)
    if embedded is None:
        with torch.no_grad():
            embedded = encoder.base.get_input_embeddings()(ids)
    mask = kwargs.get("attention_mask")
    rows, columns, _ = embedded.shape
    real = torch.ones(rows, columns, dtype=torch.bool, device=embedded.device) if mask is None else mask.bool()
    free = real & ~special_tokens(ids, real, (*encoder.special_ids, *policy.protect))
    mass = squares(embedded.detach())
    mass = torch.where(real, mass / torch.where(real, mass, 0).sum(1, keepdim=True).clamp(min=1e-30), 0)
    counts, free_counts = torch.stack((real.sum(1), free.sum(1))).tolist()  # the one wait for the device
    column = torch.arange(columns, device=embedded.device).expand(rows, columns)
    tokens = Tokens(real.to(mass.dtype), mass, free, column, counts, free_counts)
    kept: list[list[int]] = []
    if policy.ratio is not None:
        shares = policy.shares(len(encoder.layers))
        kept = [_kept(policy, counts, share) for share in (shares if policy.what == "kv" else shares[: policy.steps])]
    return Call(policy, real, counts, tokens, column, kept)


def _kept(policy: EncoderMerge, counts: list[int], share: float) -> list[int]:
    """Tokens that each row keeps; rows of one length ask once."""
    known = {count: policy.kept(count, share) for count in set(counts)}
    return [known[count] for count in counts]


def _refuse(encoder: Encoder, kwargs: dict[str, Any]) -> None:
    config, mask = encoder.base.config, kwargs.get("attention_mask")
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise UnsupportedError(
            "output_attentions=True: attention between merged tokens has no shape of the text's. Leave it out, or take "
            "the policy off for that call."
        )
    for name in ("encoder_hidden_states", "cache", "past_key_values"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{name} was passed: kvpleat merges tokens of encoders only. Leave it out.")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UnsupportedError(
            f"attention_mask of shape {tuple(getattr(mask, 'shape', ()))}: merging must know what is padding, from "
            "a mask [rows, tokens]. Pass the tokenizer's."
        )
    modules = encoder.base.modules() if encoder.base.training else ()
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        raise UnsupportedError(
            "Gradient checkpointing runs layers twice, which would merge twice. Call "
            "model.gradient_checkpointing_disable()."
        )
