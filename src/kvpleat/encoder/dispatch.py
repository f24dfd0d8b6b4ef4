"""`kvpleat.compress` and `kvpleat.attach`: the attachment that a model and a policy make together."""

from typing import overload

from torch import nn

from kvpleat.encoder.attach import MergedEncoder
from kvpleat.encoder.families import is_encoder
from kvpleat.errors import OptionError, UnsupportedError
from kvpleat.hf.attach import Pleated
from kvpleat.policies.base import Policy
from kvpleat.policies.encoder import EncoderMerge

PAGE_SIZE = 16


@overload
def compress(model: nn.Module, policy: Policy, *, page_size: int = ..., max_pages: int | None = ...) -> Pleated: ...
@overload
def compress(model: nn.Module, policy: EncoderMerge) -> MergedEncoder: ...
def compress(
    model: nn.Module, policy: Policy | EncoderMerge, *, page_size: int = PAGE_SIZE, max_pages: int | None = None
) -> Pleated | MergedEncoder:
    """Compress the KV memory of a causal LM, or merge the tokens of an encoder, inside a `with` block.

    Args:
        model: a transformers causal LM of a known family in eval mode, on one device; or an encoder (BERT, RoBERTa,
            DistilBERT, ModernBERT and heads on them, or a SentenceTransformer), in either mode.
        policy: what to keep; see kvpleat.policies. EncoderMerge is for encoders, all others for causal LMs.
        page_size: entries per page, 16 or 32. max_pages: limit of the page pool; None: the machine's memory. Both for
            causal LMs only.

    Raises:
        UnsupportedError: the model's family or mode cannot be served, or not by this policy.
        AttachError: something is attached already.

    Example:
        >>> with compress(model, policies.AttentionScore(ratio=4.0)) as pleated:
        ...     out = model.generate(**inputs, max_new_tokens=128)
        ...     print(pleated.report())
        >>> with compress(bert, policies.EncoderMerge(ratio=2.6)) as merged:
        ...     states = bert(**inputs).last_hidden_state  # [B, T, C] as ever
        ...     print(merged.trace.ratio)
    """
    if isinstance(policy, EncoderMerge):
        if page_size != PAGE_SIZE or max_pages is not None:
            raise OptionError(
                f"page_size={page_size}, max_pages={max_pages}: an encoder has no cache, so there are no pages. Leave "
                "them out."
            )
        return MergedEncoder(model, policy)
    if is_encoder(model):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder, which keeps no cache that {policy!r} could compress. Pass "
            "policies.EncoderMerge(ratio=2.0), which merges its tokens."
        )
    return Pleated(model, policy, page_size=page_size, max_pages=max_pages)


@overload
def attach(model: nn.Module, policy: Policy, *, page_size: int = ..., max_pages: int | None = ...) -> Pleated: ...
@overload
def attach(model: nn.Module, policy: EncoderMerge) -> MergedEncoder: ...
def attach(
    model: nn.Module, policy: Policy | EncoderMerge, *, page_size: int = PAGE_SIZE, max_pages: int | None = None
) -> Pleated | MergedEncoder:
    """Attach a policy to a model until `detach()` is called. Prefer `with compress(...)`, which cannot forget to."""
    if isinstance(policy, EncoderMerge):
        return compress(model, policy).attach()
    return compress(model, policy, page_size=page_size, max_pages=max_pages).attach()
