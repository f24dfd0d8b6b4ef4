"""A PagedKVCache as plain tensors and back, and the file format around them: safetensors, checked before it is
believed.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvpleat.cache.paged import PagedKVCache
from kvpleat.errors import CacheFileError

FORMAT = "kvpleat-cache-1"


def pack(kv: PagedKVCache) -> dict[str, Tensor]:
    """The live entries of a cache as its pages hold them, streams one after the other: each of `KVShape.arrays` as
    [n, ...], "lengths" [R, L, H], "queries", "samples.ROW.LAYER" where a prompt is open, and "delayed.NAME" of each
    tensor of `DelayedState` where entries leave one by one."""
    tensors: dict[str, list[Tensor]] = {name: [] for name in kv.shape.arrays}
    for row in range(kv.num_rows):
        for layer in range(kv.shape.num_layers):
            content, live = kv.stored(layer, row)
            for name, tensor in content.items():
                tensors[name].append(tensor[live])
    packed = {name: torch.cat(parts).contiguous() for name, parts in tensors.items()}
    samples = {f"samples.{row}.{layer}": tensor for (row, layer), tensor in kv.observed.samples.items()}
    if kv.delayed is not None:
        samples |= {f"delayed.{name}": tensor.clone() for name, tensor in kv.delayed.tensors.items()}
    return packed | samples | {"lengths": kv.lengths.clone(), "queries": kv.observed.last.clone()}


def unpack(kv: PagedKVCache, tensors: dict[str, Tensor]) -> None:
    """Fill an empty cache with what `pack` returned."""
    lengths, start = tensors["lengths"], 0
    for row in range(kv.num_rows):
        for layer in range(kv.shape.num_layers):
            counts = lengths[row, layer].tolist()
            part = {name: tensors[name][start : start + sum(counts)] for name in kv.shape.arrays}
            kv.fill(layer, row, counts, part)
            start += sum(counts)
    kv.observed.last.copy_(tensors["queries"])
    if kv.delayed is not None:
        kv.delayed.load({name: tensors[f"delayed.{name}"] for name in kv.delayed.tensors})
    for name, tensor in tensors.items():
        if name.startswith("samples."):
            row_text, layer_text = name.removeprefix("samples.").split(".")
            kv.observed.samples[int(row_text), int(layer_text)] = tensor


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a file beside `path` and put it in place only once it is complete.

    Raises:
        CacheFileError: it could not be written; an older file at `path` is untouched and nothing is left behind.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = {"format": FORMAT, "header": text, "sha256": _digest(tensors, text)}
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask makes of a new file; safetensors makes it private
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        raise CacheFileError(
            f"{path} could not be written ({error}); the cache is unharmed and nothing was left on disk. Free "
            f"{needed:,} bytes there or choose another folder, and save again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `write` wrote.

    Raises:
        CacheFileError: the file is missing, truncated, changed, or not one of ours.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CacheFileError(
                    f"{path} is not a kvpleat cache of format {FORMAT} (it says {metadata.get('format')!r}), so its "
                    "tensors would be misread. Pass a file that cache.save() of this version wrote."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, CacheFileError):
            raise
        raise CacheFileError(
            f"{path} cannot be read as safetensors ({error}): it is missing, truncated or foreign. Nothing was loaded; "
            "save the cache again."
        ) from error
    text = metadata.get("header", "")
    if _digest(tensors, text) != metadata.get("sha256"):
        raise CacheFileError(
            f"{path} was damaged after it was written: its checksum differs. Nothing was loaded; save it again."
        )
    try:
        header: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise CacheFileError(
            f"{path} has no readable header ({error}). Nothing was loaded; save the cache again."
        ) from error
    return tensors, header


def _digest(tensors: dict[str, Tensor], header: str) -> str:
    """SHA-256 over the header and the names, shapes, types and bytes of all tensors."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
