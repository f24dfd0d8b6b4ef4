"""Saving a PleatedCache and loading it again: what must agree for the entries to mean the same."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvpleat import policies
from kvpleat.cache import snapshot
from kvpleat.errors import CacheFileError
from kvpleat.hf.cache import PleatedCache
from kvpleat.hf.families import ModelFacts

if TYPE_CHECKING:
    from kvpleat.hf.attach import Pleated


def save(cache: PleatedCache, path: Path) -> None:
    """Write `cache` to `path`. Raises CacheFileError where it cannot be written."""
    tensors: dict[str, Tensor] = {} if cache.kv is None else snapshot.pack(cache.kv)
    sliding = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            tensors[f"sliding.{i}.keys"], tensors[f"sliding.{i}.values"] = layer.keys, layer.values
            sliding[str(i)] = layer.cumulative_length
    pleated = cache.pleated
    header = {
        "model": fingerprint(pleated.facts),
        "policy": pleated.policy.to_dict(),
        "progress": cache.progress(),
        "sliding": sliding,
        "started": cache.kv is not None,
    }
    snapshot.write(path, tensors, header)


def load(pleated: "Pleated", path: Path) -> PleatedCache:
    """The cache in `path`, for this attachment. Raises CacheFileError unless everything fits."""
    tensors, header = snapshot.read(path)
    try:
        return _restore(pleated, path, tensors, header)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, CacheFileError):
            raise
        raise CacheFileError(
            f"{path} is no complete kvpleat cache ({type(error).__name__}: {error}). Nothing was loaded; save the "
            "cache again."
        ) from error


def _restore(pleated: "Pleated", path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> PleatedCache:
    """The cache that tensors and header describe; any exception leaves nothing behind."""
    for what, found, wanted in (
        ("model", header["model"], fingerprint(pleated.facts)),
        ("policy", _plain(header["policy"]), _plain(pleated.policy.to_dict())),
    ):
        if found != wanted:
            raise CacheFileError(
                f"{path} was written for {what} {found} and this attachment has {wanted}; its entries would mean "
                f"something else. Attach with the same {what}."
            )
    cache = PleatedCache(pleated)
    try:
        if header["started"]:
            unpacked = {name: tensor.to(pleated.facts.device) for name, tensor in tensors.items()}
            snapshot.unpack(cache.start(len(header["progress"]["positions"])), unpacked)
            for i, seen in header["sliding"].items():
                layer: Any = cache.layers[int(i)]
                layer.lazy_initialization(unpacked[f"sliding.{i}.keys"], unpacked[f"sliding.{i}.values"])
                layer.keys, layer.values = unpacked[f"sliding.{i}.keys"], unpacked[f"sliding.{i}.values"]
                layer.cumulative_length = seen
        cache.set_progress(header["progress"])
    except BaseException:
        cache.release()
        raise
    return cache


def fingerprint(facts: ModelFacts) -> dict[str, Any]:
    """What tells one model from another as far as its entries go: shapes, and a checksum over a sample of its
    weights."""
    shape = facts.shape
    digest = hashlib.sha256()
    for name, parameter in sorted(facts.decoder.named_parameters()):
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return {
        "family": facts.family,
        "layers": shape.num_layers,
        "kv_heads": shape.num_kv_heads,
        "q_heads": shape.num_q_heads,
        "head_dim": shape.head_dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "weights": digest.hexdigest()[:16],
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Policy options as they look after a round trip through JSON."""
    return policies.from_dict(options).to_dict()
