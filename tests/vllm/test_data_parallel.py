"""`kvpleat serve -- --data-parallel-size 2`: two engines behind one address, each with its scheduler and its cache."""

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm import engines  # isort: skip  # skips this module where vLLM is not installed
from tests.vllm.servers import Process, free_port

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow, pytest.mark.timeout(1500)]

FLAGS = [
    *(
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--skip-tokenizer-init",
        "--max-model-len",
        "384",
    ),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", str(engines.CHUNK), "--num-gpu-blocks-override", "40"),
]


def told(url: str, prompt: engines.Tokens) -> engines.Tokens:
    """What a server says to a prompt: greedy, 24 tokens."""
    asked = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
             "detokenize": False}  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return list(json.load(answer)["choices"][0]["token_ids"])


def test_two_engines_say_what_transformers_says(tmp_path: Path) -> None:
    """Whichever is asked, 16 clients at once, three times; both serve some, and each has metrics of its own."""
    model, policy, _ = engines.make(tmp_path, "llama", "fold")
    asked = engines.prompts((1, 17, 64, 130, 90, 100, 33, 70)) * 2
    want = engines.by_transformers(model, policy, asked[:8]) * 2
    serve = [
        "-m",
        "kvpleat.cli",
        "serve",
        str(tmp_path / "model"),
        "--policy",
        "fold",
        "--gates",
        str(tmp_path / "gates"),
    ]
    port = free_port()
    server = Process(
        [sys.executable, *serve, "--", *FLAGS, "--port", str(port), "--data-parallel-size", "2"],
        tmp_path / "log.txt", port,
    )  # fmt: skip
    server.begin()
    try:
        server.wait()
        with ThreadPoolExecutor(len(asked)) as clients:
            for _ in range(3):
                assert list(clients.map(lambda prompt: told(server.url, prompt), asked)) == want
        for engine in "01":
            assert server.metric("vllm:request_success_total", engine=engine) >= 10
            assert server.metric("kvpleat_compression_ratio", engine=engine) > 1.1
        assert server.metric("vllm:request_success_total") == 3 * len(asked)
    finally:
        server.end()
