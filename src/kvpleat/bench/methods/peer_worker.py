"""The process that runs kvpress: `PYTHON peer_worker.py FOLDER DTYPE DEVICE THREADS`, spoken to by peers.py.

Runs in an environment that has kvpress and an older transformers, and no kvpleat. What it needs of kvpleat (the walk
over storages) depends on torch alone and is imported past the package's __init__.
"""

import contextlib
import copy
import ctypes
import json
import os
import sys
import time
import traceback
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[2]
PIECE = 16  # known tokens that a masking press is given at a time: it needs a fake key that no query of the piece sees


class Host:
    """The model, the presses and the sessions of this process."""

    def __init__(self, folder: str, dtype: str, device: str) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
        )
        self.model = self.model.to(device).eval()
        self.attention = self.model.config._attn_implementation
        self.sessions: dict[int, Session] = {}
        self.numbers = iter(range(10**9))
        self.timing: dict[str, float] = {}

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Do what a request says."""
        op = request["op"]
        if op == "hello":
            return {"versions": {name: version(name) for name in ("kvpress", "transformers", "torch")}}, None
        if op == "timing":
            return {"timing": self.timing}, None
        if op == "process":
            return {"process": process_bytes(self.model.device, request["reset_peak"])}, None
        if op == "open":
            session = Session(self, make_press(request["press"], self.model), request["eager"])
            return self._keep(session), None
        session = self.sessions[request["session"]]
        if op == "fork":
            return self._keep(session.fork()), None
        if op == "memory":
            return {"memory": session.memory()}, None
        if op == "close":
            del self.sessions[request["session"]]
            return {}, None
        ids = torch.tensor(request["ids"], device=self.model.device)
        start = time.perf_counter()
        logits = getattr(session, op)(ids)
        if logits.device.type == "cuda":
            torch.cuda.synchronize()
        self.timing = {"seconds": time.perf_counter() - start}
        return {}, logits

    def _keep(self, session: "Session") -> dict[str, Any]:
        number = next(self.numbers)
        self.sessions[number] = session
        return {"session": number}

    def set_attention(self, name: str) -> None:
        """Switch transformers' attention implementation."""
        if self.model.config._attn_implementation != name:
            self.model.set_attn_implementation(name)


class Session:
    """One DynamicCache that a press compresses at the end of its first prompt; later tokens are kept.

    Positions are passed by hand: the cache is shorter than what has been seen, and kvpress leaves keys where they were.
    """

    def __init__(self, host: Host, press: Any, eager: bool) -> None:
        from transformers import DynamicCache

        self.host, self.press, self.eager = host, press, eager
        self.cache = DynamicCache(config=host.model.config)
        self.seen = 0
        self.masked: list[Any] = [None] * host.model.config.num_hidden_layers

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Any:
        """Feed a prompt: compress the first one."""
        if self.seen:
            return self.decode(ids)[:, -1]
        self._set_masks()
        self.host.set_attention("eager" if self.eager else self.host.attention)
        with self.press(self.host.model):
            hidden = self.host.model.model(input_ids=ids, past_key_values=self.cache).last_hidden_state[:, -1:]
            logits = self.host.model.lm_head(hidden)[:, -1]
        self.host.set_attention(self.host.attention)
        self.masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.host.model.model.layers]
        self.seen = ids.shape[1]
        return logits

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Feed tokens after the compressed prompt."""
        self._set_masks()
        pieces = ids.split(PIECE if any(m is not None for m in self.masked) else ids.shape[1], dim=1)
        return torch.cat([logits for piece in pieces for logits in self._feed(piece)], dim=1)

    def _feed(self, ids: Tensor) -> list[Tensor]:
        lengths = [layer.keys.shape[2] for layer in self.cache.layers]
        positions = torch.arange(self.seen, self.seen + ids.shape[1], device=ids.device)[None].expand(ids.shape)
        try:
            logits = self.host.model(ids, past_key_values=self.cache, position_ids=positions).logits
        except ValueError as error:
            if "fake keys" not in str(error) or ids.shape[1] == 1:
                raise
            for layer, length in zip(self.cache.layers, lengths, strict=True):  # take back what the first layers took
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            return [part for token in ids.split(1, dim=1) for part in self._feed(token)]
        self.seen += ids.shape[1]
        return [logits]

    def _set_masks(self) -> None:
        for layer, masked in zip(self.host.model.model.layers, self.masked, strict=True):
            layer.self_attn.masked_key_indices = masked

    def fork(self) -> "Session":
        """An independent copy."""
        twin = Session(self.host, self.press, self.eager)
        twin.cache, twin.seen, twin.masked = copy.deepcopy(self.cache), self.seen, self.masked
        return twin

    def memory(self) -> dict[str, Any]:
        """Bytes, and what each head can read."""
        from kvpleat.accounting import storage_bytes  # type: ignore[import-untyped,unused-ignore]

        config = self.host.model.config
        shape = self.cache.layers[0].keys.shape
        entry = 2 * shape[3] * self.cache.layers[0].keys.element_size()
        kept = []
        for layer, masked in zip(self.cache.layers, self.masked, strict=True):
            counts = torch.full((shape[1],), float(layer.keys.shape[2]))
            if masked is not None:
                counts -= torch.bincount(masked[1].cpu().long(), minlength=shape[1]) / shape[0]
            kept.append(counts.tolist())
        rows_full = config.num_hidden_layers * shape[1] * self.seen * shape[0] * entry
        return {
            "full_bytes": rows_full,
            "allocated_bytes": storage_bytes([self.cache, self.masked]),
            "claimed_bytes": int(sum(map(sum, kept)) * shape[0] * entry),
            "kept": kept,
        }


def make_press(request: dict[str, Any], model: Any) -> Any:
    """The press that a request describes."""
    import kvpress

    name, removed, options = request["name"], request["removed"], request["options"]
    plain = {
        "streaming": kvpress.StreamingLLMPress,
        "h2o": kvpress.ObservedAttentionPress,
        "tova": kvpress.TOVAPress,
        "snapkv": kvpress.SnapKVPress,
        "keydiff": kvpress.KeyDiffPress,
        "expected": kvpress.ExpectedAttentionPress,
        "kvzip": kvpress.KVzipPress,
    }
    if name in plain:
        return plain[name](compression_ratio=removed, **options)
    if name == "adakv":
        return kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=removed, **options))
    if name == "adaexpected":
        return kvpress.AdaKVPress(
            kvpress.ExpectedAttentionPress(compression_ratio=removed, **{"epsilon": 1e-2, **options})
        )
    from kvpress.presses.kvzap_press import KVzapModel, KVzapPress

    folder = options.pop("model")
    press = KVzapPress(compression_ratio=removed, **options)
    press.kvzap_model = KVzapModel.from_pretrained(folder)
    press.post_init_from_model = lambda _: None  # it would ask the hub for a model of this name
    return kvpress.AdaKVPress(press)


def process_bytes(device: torch.device, reset_peak: bool = False) -> dict[str, int]:
    """Memory of this process now and at its peak: torch's allocator on a GPU, resident pages on a CPU (Linux).

    Now counts anonymous pages only: those of files (libraries) come and go with what else the machine does. Of the peak
    Linux knows all pages together.

    Args:
        device: what memory is asked for.
        reset_peak: the peak counts from now on.
    """
    if device.type == "cuda":
        if reset_peak:
            torch.cuda.reset_peak_memory_stats(device)
        return {"bytes": torch.cuda.memory_allocated(device), "peak_bytes": torch.cuda.max_memory_allocated(device)}
    with contextlib.suppress(AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"bytes": 1024 * int(status["RssAnon"].split()[0]), "peak_bytes": 1024 * int(status["VmHWM"].split()[0])}


def main() -> None:
    """Answer requests until the pipe closes."""
    package = types.ModuleType("kvpleat")
    package.__path__ = [str(PACKAGE)]
    sys.modules["kvpleat"] = package
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the libraries print goes to stderr
    folder, dtype, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.backends.cuda.matmul.allow_tf32 = False
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    host = Host(folder, dtype, device)
    for line in sys.stdin.buffer:
        try:
            answer, logits = host.answer(json.loads(line))
        except Exception as error:  # the other side decides what a failure means
            traceback.print_exc()
            answer, logits = {"error": f"{type(error).__name__}: {error}"}, None
        if logits is not None:
            logits = logits.float().cpu().contiguous()
            answer["shape"] = list(logits.shape)
        out.write(json.dumps(answer).encode() + b"\n")
        if logits is not None:
            out.write(logits.numpy().data)
        out.flush()


if __name__ == "__main__":
    main()
