"""A server of vLLM's that is watched from outside: started, asked for its metrics, stopped."""

import contextlib
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

RATIO, LOOKS = "kvpleat_compression_ratio", 0.2  # seconds from one look at the metrics to the next
COUNTED = ("kvpleat_compression_ratio", "kvpleat_head_skew", "kvpleat_allocated_bytes", "kvpleat_full_bytes",
           "vllm:num_preemptions_total", "vllm:kv_cache_usage_perc")  # fmt: skip


def metrics(port: int) -> dict[str, float]:
    """`counted` of the server's /metrics; nothing if it does not answer."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return counted(answer.read().decode())
    return {}


@contextlib.contextmanager
def watched(port: int) -> Iterator[dict[str, float]]:
    """Metrics as they were when requests had most tokens; there once the block has ended."""
    fullest: dict[str, float] = {}
    ended = threading.Event()

    def look() -> None:
        most = -1.0
        while not ended.wait(LOOKS):
            now = metrics(port)
            tokens = now.get("kvpleat_full_bytes", now.get("vllm:kv_cache_usage_perc", -1.0))
            if tokens >= most:
                most = tokens
                fullest.update(now)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield fullest
    finally:
        ended.set()
        thread.join()


def counted(text: str) -> dict[str, float]:
    """COUNTED of what Prometheus is told, summed over labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in COUNTED:
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


class Server:
    """A server of vLLM's, and its log."""

    def __init__(self, made: list[str], port: int, log: Path) -> None:
        self.port, self.log = port, log
        environment = dict(os.environ, VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                made, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def ready(self, seconds: float) -> None:
        """Wait until it answers. Raises RuntimeError with the end of its log if it does not."""
        stop = time.monotonic() + seconds
        while time.monotonic() < stop and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
                if answer.status == 200:
                    return
            time.sleep(0.5)
        raise RuntimeError(f"The server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def said(self) -> list[str]:
        """Lines of its log about the size of the cache."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [x.strip()[-110:] for x in lines if "KV cache size" in x or "Maximum concurrency" in x]

    def close(self) -> None:
        """Stop it."""
        for how, wait in ((signal.SIGINT, 8), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait)
                return
