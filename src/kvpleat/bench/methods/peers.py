"""kvpress's presses as methods, each in a worker process with a Python of its own.

kvpress pins a transformers older than ours and patches every attention function on import, so it never shares a process
with kvpleat. `make peers` builds its environment. The worker (peer_worker.py) holds model and caches; this side sends
tokens and gets logits back, over pipes.
"""

import atexit
import contextlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpleat.bench.methods.base import Memory, Method, Session
from kvpleat.errors import OptionError, PeerError
from kvpleat.hf.models import LoadedModel
from kvpleat.policies.budget import check_ratio

ENVIRONMENT = "KVPLEAT_PEERS_PYTHON"
DEFAULT_PYTHON = Path(".venv-peers/bin/python")
WORKER = Path(__file__).with_name("peer_worker.py")


@dataclass(frozen=True)
class Press:
    """A press of kvpress.

    Args:
        label: for people. summary: what it keeps.
        masks: evicted entries are only masked; the cache keeps its full size.
        eager: needs the full attention matrix, and so transformers' eager attention.
    """

    label: str
    summary: str
    masks: bool = False
    eager: bool = False


PRESSES = {
    "streaming": Press("sinks + window (kvpress)", "StreamingLLMPress: the first 4 and the latest entries"),
    "h2o": Press("H2O", "ObservedAttentionPress: attention received from the whole prompt", eager=True),
    "tova": Press("TOVA", "TOVAPress: attention of the last token"),
    "snapkv": Press("SnapKV", "SnapKVPress: attention of the last 64 tokens, pooled"),
    "adakv": Press("Ada-KV", "AdaKVPress over SnapKVPress: heads of a layer compete", masks=True),
    "keydiff": Press("KeyDiff", "KeyDiffPress: keys unlike the mean key"),
    "expected": Press("Expected Attention", "ExpectedAttentionPress: attention that future queries will pay"),
    "adaexpected": Press(
        "Ada-KV + Expected Attention", "AdaKVPress over ExpectedAttentionPress: heads of a layer compete", masks=True
    ),
    "kvzip": Press("KVzip", "KVzipPress: attention while the context is repeated (two to three prefills)", masks=True),
    "kvzap": Press("KVzap", "KVzapPress: a trained guess of KVzip's score; model=FOLDER names the guesser", masks=True),
}


class Peer(Method):
    """A press at a compression ratio (full over kept entries of the prompt; kvpress's own figure is 1 - 1/ratio).

    Args:
        name: of PRESSES.
        spec: what the user typed.
        ratio: of the prompt; what follows is kept, as kvpress's presses for prefill do.
        options: fields of the press, passed on ("window_size=32"), or `model` for kvzap.
    """

    family = "kvpress"

    def __init__(self, name: str, spec: str, ratio: float = 4.0, **options: Any) -> None:
        check_ratio(ratio)
        if name == "kvzap" and "model" not in options:
            raise OptionError(
                "kvzap needs a trained guesser for this very model, and none comes with kvpress. Pass its folder: "
                "kvzap:ratio=4,model=FOLDER."
            )
        press = PRESSES[name]
        self.name, self.spec, self.ratio, self.removed = name, spec, ratio, 1 - 1 / ratio
        self.label = f"{press.label} {ratio:g}x"
        self.storage = "mask only" if press.masks else "contiguous"
        self.options = {"ratio": ratio, **options}
        self.eager = press.eager

    def open(self, loaded: LoadedModel) -> "PeerSession":
        worker = _worker(loaded)
        press = {"name": self.name, "removed": self.removed, "options": self._press_options()}
        answer, _ = worker.ask({"op": "open", "press": press, "eager": self.eager})
        return PeerSession(worker, answer["session"], str(loaded.model.device))

    def _press_options(self) -> dict[str, Any]:
        return {k: v for k, v in self.options.items() if k != "ratio"}


class PeerSession(Session):
    """A cache in the worker."""

    def __init__(self, worker: "Worker", number: int, device: str) -> None:
        self._worker, self._number, self._device = worker, number, device

    def prefill(self, ids: Tensor) -> Tensor:
        return self._feed("prefill", ids)

    def decode(self, ids: Tensor) -> Tensor:
        return self._feed("decode", ids)

    def _feed(self, op: str, ids: Tensor) -> Tensor:
        _, logits = self._worker.ask({"op": op, "session": self._number, "ids": ids.tolist()})
        assert logits is not None
        return logits.to(self._device)

    def fork(self) -> "PeerSession":
        answer, _ = self._worker.ask({"op": "fork", "session": self._number})
        return PeerSession(self._worker, answer["session"], self._device)

    def memory(self) -> Memory:
        answer, _ = self._worker.ask({"op": "memory", "session": self._number})
        return Memory(**answer["memory"])

    def timing(self) -> dict[str, float]:
        """{"seconds": of the last prefill or decode inside the worker}."""
        answer, _ = self._worker.ask({"op": "timing"})
        return dict(answer["timing"])

    def process_bytes(self, *, reset_peak: bool = False) -> dict[str, int]:
        """Bytes of the worker's process now and at peak: see peer_worker.process_bytes."""
        answer, _ = self._worker.ask({"op": "process", "reset_peak": reset_peak})
        return dict(answer["process"])

    def close(self) -> None:
        self._worker.ask({"op": "close", "session": self._number})


class Worker:
    """The other process: one JSON line and perhaps a tensor there, one JSON line and perhaps a tensor back."""

    def __init__(self, python: Path, folder: str, dtype: str, device: str) -> None:
        arguments = [str(python), str(WORKER), folder, dtype, device, str(torch.get_num_threads())]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**environment, "HF_HUB_OFFLINE": "1"}
        )
        self.versions = self.ask({"op": "hello"})[0]["versions"]

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Send a request, wait for the answer. Raises PeerError where the worker failed or died."""
        sender, receiver = self._process.stdin, self._process.stdout
        assert sender is not None
        assert receiver is not None
        try:
            sender.write(json.dumps(request).encode() + b"\n")
            sender.flush()
            line = receiver.readline()
        except (BrokenPipeError, ValueError):  # the process ended, or was ended here
            line = b""
        if not line:
            raise PeerError(
                f"The kvpress worker ended ({self._process.poll()}) while it did {request['op']!r}; its own words are "
                "above. Run with fewer tokens, or leave the press out."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"kvpress failed while it did {request['op']!r}: {answer['error']}")
        return answer, _read_tensor(receiver, answer["shape"]) if "shape" in answer else None

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _read_tensor(stream: Any, shape: list[int]) -> Tensor:
    content = bytearray(4 * int(np.prod(shape)))
    view, done = memoryview(content), 0
    while done < len(content):
        count = stream.readinto(view[done:])
        if not count:
            raise PeerError("The kvpress worker ended in the middle of an answer. Its own words are above.")
        done += count
    return torch.frombuffer(content, dtype=torch.float32).view(shape)


_workers: dict[tuple[str, str, str, str], Worker] = {}


def peers_python() -> Path:
    """The Python that has kvpress. Raises OptionError where there is none."""
    python = Path(os.environ.get(ENVIRONMENT, DEFAULT_PYTHON))
    if not python.exists():
        raise OptionError(
            f"kvpress's presses run in a Python environment of their own, and {python} does not exist. Run "
            f"`make peers`, or set {ENVIRONMENT} to a Python that has kvpress and torch."
        )
    return python


def _worker(loaded: LoadedModel) -> Worker:
    """The running worker for a model, started on first use."""
    folder = str(loaded.model.config.name_or_path)
    if not Path(folder).is_dir():
        raise OptionError(
            f"{loaded.name} was not loaded from a local folder, so the kvpress worker cannot load it. Save it with "
            "save_pretrained and pass the folder."
        )
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    key = (str(peers_python()), folder, dtype, str(loaded.model.device))
    if key not in _workers:
        for worker in _workers.values():  # one at a time: each holds a copy of a model
            worker.end()
        _workers.clear()
        _workers[key] = Worker(peers_python(), folder, dtype, str(loaded.model.device))
    return _workers[key]


def worker_versions() -> dict[str, str]:
    """Packages of the running workers, for the foot of a report."""
    return {name: text for worker in _workers.values() for name, text in worker.versions.items()}


@atexit.register
def end_workers() -> None:
    """End all workers."""
    for worker in _workers.values():
        worker.end()
    _workers.clear()
