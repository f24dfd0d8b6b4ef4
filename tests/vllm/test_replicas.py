"""examples/vllm-replicas: two servers behind vllm-router share the requests, and one that dies is not missed."""

import importlib.util
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.servers import MODEL, Process, Server, free_port, needs_vllm

pytestmark = [
    needs_vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm_router") is None, reason="vllm-router is not installed"),
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]
openai: Any = pytest.importorskip("openai")
psutil: Any = pytest.importorskip("psutil")

SCRIPT = Path(__file__).parents[2] / "examples" / "vllm-replicas" / "serve.sh"
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"]
REQUESTS = 20


@pytest.fixture
def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Process, list[Server]]]:
    """(the script and its router, its servers)."""
    servers = [Server(tmp_path / "unused", port=port) for port in adjacent_ports()]
    router = Process([str(SCRIPT), *FLAGS], tmp_path / "log.txt", free_port())
    for name, value in {
        "MODEL": MODEL, "PORT": router.port, "FIRST_PORT": servers[0].port, "METRICS_PORT": free_port(),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    router.begin()
    try:
        for server in servers:
            server.process = router.process
            server.wait()
        router.wait()
        yield router, servers
    finally:
        router.end()


def adjacent_ports() -> tuple[int, int]:
    while True:
        first = free_port()
        try:
            return first, free_port(first + 1)
        except OSError:
            continue


def ask(client: Any, number: int) -> str:
    prompt = f"One, two, three, {number}"
    return str(client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0.0).choices[0].text)


def replica_on(port: int, script: Process) -> Any:
    """The process that listens there."""
    words = ["--port", str(port)]
    for child in psutil.Process(script.process.pid).children(recursive=True):
        line = child.cmdline()
        if any(line[i : i + 2] == words for i in range(len(line))):
            return child
    raise AssertionError(f"no process of {script.command[0]} listens on {port}")


def served(server: Server) -> float:
    return server.metric("vllm:request_success_total")


def test_two_replicas(replicas: tuple[Process, list[Server]]) -> None:
    router, servers = replicas
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        first = [ask(client, number) for number in range(REQUESTS)]
        assert all(first)
        shares = [served(server) for server in servers]
        assert sum(shares) == REQUESTS
        assert min(shares) >= REQUESTS // 4
        replica_on(servers[0].port, router).kill()
        assert [ask(client, number) for number in range(REQUESTS)] == first
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        served(servers[0])
    assert served(servers[1]) >= shares[1] + REQUESTS
