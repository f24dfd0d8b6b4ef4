"""A real server, `kvpleat serve`, and OpenAI's own client: what it answers, and what it lives through.

Answers are compared with `kvpleat.compress` on transformers. Run by `make test-vllm`.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kvpleat
from kvpleat import policies
from kvpleat.hf.models import LoadedModel, load
from tests.vllm.servers import MODEL, Server, needs_vllm

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.timeout(1500)]
openai: Any = pytest.importorskip("openai")

SPEECH = (Path(__file__).parents[2] / "examples" / "kennedy-1961.txt").read_text(encoding="utf-8")
LONG = f"{SPEECH[:2600]}\n\nIn one sentence, what is this speech about?"  # above 500 tokens: gates wait for 256
SHORT = "Name three colours."
GREEDY = {"model": MODEL, "temperature": 0.0}
Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    server.begin()
    try:
        server.wait()
        yield server
    finally:
        server.end()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(MODEL, dtype="float32", device="cpu", progress=False)


def ask(client: Any, text: str | Messages, tokens: int = 24, **options: Any) -> Any:
    messages = user(text) if isinstance(text, str) else text
    return client.chat.completions.create(messages=messages, max_tokens=tokens, **(GREEDY | options))


def complete(client: Any, tokens: int = 24, **options: Any) -> Any:
    return client.completions.create(prompt=SPEECH[:2600], max_tokens=tokens, **(GREEDY | options))


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def said(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def by_transformers(loaded: LoadedModel, prompt: str | Messages, tokens: int = 24) -> tuple[str, torch.Tensor]:
    """Greedy text of the same model under kvpleat.compress, and the log probabilities of each step [n, vocabulary]."""
    tokenizer, model = loaded.tokenizer, loaded.model
    if not isinstance(prompt, str):
        prompt = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode(), kvpleat.compress(model, policies.DMS(ratio=4.0)):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, temperature=None,
            top_p=None, top_k=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    new = out.sequences[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)), torch.stack(out.logits)[:, 0].log_softmax(-1)


@pytest.mark.parametrize("text", [SHORT, LONG], ids=["short", "long"])
def test_a_chat_is_that_of_transformers(client: Any, loaded: LoadedModel, text: str) -> None:
    answer = ask(client, text)
    assert said(answer) == by_transformers(loaded, user(text))[0]
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_several_turns(client: Any, loaded: LoadedModel) -> None:
    messages: Messages = []
    for text in (LONG, "Say it in other words.", "And who speaks?"):
        messages += user(text)
        answer = said(ask(client, messages, 12))
        assert answer == by_transformers(loaded, messages, 12)[0]
        messages.append({"role": "assistant", "content": answer})


def test_a_completion_and_its_log_probabilities(client: Any, loaded: LoadedModel) -> None:
    choice = complete(client, 16, logprobs=3).choices[0]
    text, expected = by_transformers(loaded, SPEECH[:2600], 16)
    assert choice.text == text
    best = expected.topk(3).values
    got = torch.tensor([sorted(top.values(), reverse=True)[:3] for top in choice.logprobs.top_logprobs])
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), best[:, 0], atol=2e-3, rtol=0)
    torch.testing.assert_close(got, best, atol=2e-3, rtol=0)


def test_a_stream_says_the_same(server: Server, client: Any) -> None:
    chat, ratios = [], []
    for chunk in ask(client, LONG, stream=True):
        chat.append(chunk.choices[0].delta.content or "")
        ratios.append(server.metric("kvpleat_compression_ratio"))
    assert len(chat) > 10
    assert "".join(chat) == said(ask(client, LONG))
    assert max(ratios) > 1.2, "nothing was compressed"
    text = "".join(chunk.choices[0].text for chunk in complete(client, stream=True))
    assert text == complete(client).choices[0].text


def test_it_stops_at_a_string(client: Any) -> None:
    whole = complete(client).choices[0].text
    word = whole.split()[4]
    choice = complete(client, stop=[word]).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(word)], "stop")


def test_several_answers(client: Any) -> None:
    """Drawn from the same seed they are the same again; two of one request are not."""
    options = {"n": 2, "temperature": 1.0, "seed": 7}
    first, again = ([choice.text for choice in complete(client, 8, **options).choices] for _ in range(2))
    assert len(set(first)) == 2
    assert first == again


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"text": SPEECH}, "BadRequestError"),
        ({"text": SHORT, "tokens": 5000}, "BadRequestError"),
        ({"text": SHORT, "temperature": -1.0}, "BadRequestError"),
        ({"text": SHORT, "model": "nobody"}, "NotFoundError"),
    ],
    ids=["a long prompt", "a long answer", "a temperature", "a model"],
)
def test_what_cannot_be_is_refused(client: Any, options: dict[str, Any], error: str) -> None:
    with pytest.raises(getattr(openai, error)):
        ask(client, **options)
    assert said(ask(client, SHORT, 4))


def idle(server: Server) -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(server.metric(f"vllm:{name}") == 0 for name in names)


async def many(url: str, count: int) -> list[str | None]:
    """What so many clients at once are told; every third leaves at its first words (None)."""

    async def one(client: Any, number: int) -> str | None:
        prompt = SPEECH[number * 20 : number * 20 + 30 + 11 * (number % 17)]
        stream = await client.completions.create(prompt=prompt, max_tokens=4, stream=True, **GREEDY)
        said = ""
        async for chunk in stream:
            said += chunk.choices[0].text
            if number % 3 == 0:
                await stream.close()
                return None
        return said

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=500) as client:
        return await asyncio.gather(*(one(client, number) for number in range(count)))


def test_clients_that_come_and_go(server: Server, client: Any) -> None:
    """200 at once on 16 seats: all are answered, nothing stays behind, and answers are what they were. Gauges are those
    of the last step with requests, so what the workers hold shows when there is one request again."""
    before = said(ask(client, LONG))
    held = server.metric("kvpleat_allocated_bytes")
    answers = asyncio.run(many(server.url, 200))
    assert [number for number, answer in enumerate(answers) if answer is None] == list(range(0, 200, 3))
    assert all(answers[number] for number in range(200) if number % 3)
    end = time.monotonic() + 60
    while not idle(server) and time.monotonic() < end:
        time.sleep(0.2)
    assert idle(server)
    assert said(ask(client, LONG)) == before
    assert server.metric("kvpleat_allocated_bytes") == held > 0


def test_metrics(server: Server) -> None:
    assert server.metric("kvpleat_forced_evictions_total") == 0
    assert server.metric("kvpleat_freed_blocks_total") > 0
    assert server.metric("kvpleat_head_skew") >= 0


def test_killed_in_mid_stream_and_started_again(server: Server, client: Any) -> None:
    before = said(ask(client, LONG))
    stream = ask(client, LONG, 400, stream=True)
    assert len(list(itertools.islice(stream, 3))) == 3
    server.kill()
    with pytest.raises((openai.APIError, OSError)):
        list(stream)
    server.begin()
    server.wait()
    assert said(ask(client, LONG)) == before
