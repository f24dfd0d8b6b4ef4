"""`kvpleat serve` processes for tests, on the CPU. Nothing here imports vLLM."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import kvpleat

MODEL = "smollm2-135m"
START_S = 900  # two imports of vLLM one after the other, on cores that may be busy with other tests
SOURCE = str(Path(kvpleat.__file__).parents[1])
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": SOURCE,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
}
needs_vllm = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("vllm", "openai")), reason="vLLM is not installed"
)


def free_port(wanted: int = 0) -> int:
    """A port that nobody listens on. Raises OSError where somebody listens on the one that is wanted."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", wanted))
        return int(listener.getsockname()[1])


def fetch(url: str) -> str:
    """What a GET says."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


class Process:
    """A process that answers on a port, and its children.

    Args:
        command: of the process. log: file for what it prints. port: where its /health answers.
    """

    def __init__(self, command: list[str], log: Path, port: int) -> None:
        self.command, self.log, self.port = command, log, port
        self._groups: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self) -> None:
        """Start it, and do not wait."""
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | SETTINGS
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )
        self._groups.append(self.process.pid)

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                fetch(f"{self.url}/health")
                return
            time.sleep(0.5)
        raise AssertionError(f"no answer of {' '.join(self.command)}:\n{self.log.read_text()[-4000:]}")

    def metric(self, name: str, **labels: str) -> float:
        """One of /metrics, summed over what has these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = [line for line in fetch(f"{self.url}/metrics").splitlines() if line.startswith(name + "{")]
        lines = [line for line in lines if all(x in line for x in wanted)]
        assert lines, f"/metrics has no {name} with {labels}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def kill(self) -> None:
        """SIGKILL to the process alone: its children have to notice."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """All that was ever started, whatever its state."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()


class Server(Process):
    """`kvpleat serve` with SmolLM2 and its gates of ratio 4 in float32; `flags` of vLLM beside."""

    def __init__(self, log: Path, *flags: str, port: int | None = None) -> None:
        port = port or free_port()
        command = [sys.executable, "-m", "kvpleat.cli", "serve", MODEL, "--policy", "dms", "--ratio", "4", "--"]
        command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
        super().__init__([*command, "--max-model-len", "1024", "--max-num-seqs", "16", *flags], log, port)
