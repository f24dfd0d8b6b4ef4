"""Methods: what specs mean, that sessions are independent and exact where they should be, and that bytes are real."""

import os
import stat
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvpleat import policies
from kvpleat.accounting import storage_bytes
from kvpleat.bench import methods
from kvpleat.bench.methods import peers
from kvpleat.errors import OptionError, PeerError
from kvpleat.hf.families import base_of, describe
from kvpleat.hf.models import LoadedModel
from kvpleat.policies import learned
from tests.bench import byte_model

PROMPT, MORE = 700, 40


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """One model for all tests here."""
    return byte_model.load()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """[1, T] tokens."""
    return torch.randint(2, 258, (1, PROMPT + MORE), generator=torch.Generator().manual_seed(0))


def run(method: methods.Method, loaded: LoadedModel, ids: torch.Tensor) -> tuple[torch.Tensor, methods.Memory]:
    """Logits [1, MORE + 1, V] after a prompt, and the bytes then."""
    with method.open(loaded) as session:
        first = session.prefill(ids[:, :PROMPT])
        rest = session.decode(ids[:, PROMPT:])
        return torch.cat([first[:, None], rest], 1), session.memory()


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("full", ["full"]),
        ("full, window:ratio=4", ["full", "window:ratio=4"]),
        ("attention:ratio=4,slack=2,full", ["attention:ratio=4,slack=2", "full"]),
        ("attention:ratio=2|4|8,fold=0", [f"attention:ratio={r},fold=0" for r in (2, 4, 8)]),
        ("snapkv:ratio=2|4,window_size=16|32", [f"snapkv:ratio={r},window_size={w}" for r in (2, 4) for w in (16, 32)]),
        ("full,full", ["full"]),
    ],
)
def test_lists(text: str, specs: list[str]) -> None:
    """Commas part methods and options alike; what follows tells which."""
    assert [method.spec for method in methods.parse_list(text)] == specs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no policy"),
        ("nothing", "no such policy or cache"),
        ("attention:ratio", "is no option"),
        ("attention:ratio=4,colour=2", "does not take these options"),
        ("dynamic:ratio=2", "does not take these options"),
        ("random:ratio=0.5", "ratio=2"),
        ("snapkv:ratio=0.25", "full over compressed"),
        ("quantized:bits=3", "quanto with"),
        ("kvzap:ratio=4", "trained guesser"),
    ],
)
def test_bad_lists(text: str, message: str) -> None:
    """Each says what is wrong."""
    with pytest.raises(OptionError, match=message):
        methods.parse_list(text)


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("dms:ratio=4", "DMS 4x"),
        ("fold:ratio=8,bits=8", "Fold 8x bits=8"),
        ("dmc:gates=some/where/mine", "DMC mine"),
        ("dms:gates=4", "DMS 4"),
        ("attention:ratio=4,fold=0", "AttentionScore 4x fold=0"),
    ],
)
def test_labels(spec: str, label: str) -> None:
    """Names as people write them; gates by the last part of their folder."""
    assert methods.parse(spec).label == label


def test_the_reference_is_a_plain_forward(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """DynamicCache in a session: the logits of one forward without any cache, and the bytes of its tensors."""
    got, memory = run(methods.parse("dynamic"), loaded, ids)
    torch.testing.assert_close(got[0], loaded.model(ids).logits[0, PROMPT - 1 :])
    assert memory.allocated_bytes == memory.full_bytes == 2 * 2 * 2 * 8 * 4 * (PROMPT + MORE)  # L, k and v, H, D, bytes


def test_full_is_the_reference(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """kvpleat's pages give the same logits; their allocated bytes count half-empty pages and page tables."""
    got, memory = run(methods.parse("full"), loaded, ids)
    torch.testing.assert_close(got, run(methods.parse("dynamic"), loaded, ids)[0], atol=1e-5, rtol=1e-4)
    assert memory.allocated_bytes > memory.claimed_bytes >= memory.full_bytes


@pytest.mark.parametrize("spec", ["dynamic", "full", "window:budget=64", "attention:ratio=4", "random:ratio=4"])
def test_forks_are_independent(loaded: LoadedModel, ids: torch.Tensor, spec: str) -> None:
    """What a fork is fed changes nothing for the session it came from, nor for another fork."""
    expected, _ = run(methods.parse(spec), loaded, ids)
    with methods.parse(spec).open(loaded) as session:
        session.prefill(ids[:, :PROMPT])
        with session.fork() as fork:
            fork.decode(ids[:, :30])
        with session.fork() as fork:
            torch.testing.assert_close(fork.decode(ids[:, PROMPT:]), expected[:, 1:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(session.decode(ids[:, PROMPT:]), expected[:, 1:], atol=1e-5, rtol=1e-4)
    assert loaded.model.config._attn_implementation != "kvpleat"


@pytest.mark.parametrize("name", ["dms", "fold", "dmc"])
def test_gates_of_a_folder_are_a_method(loaded: LoadedModel, ids: torch.Tensor, name: str, tmp_path: Path) -> None:
    """Gates that mark every token: a session holds little more than their delay, and forks are independent."""
    base = base_of(loaded.model, describe(loaded.model))
    policy = policies.registry()[name]
    assert issubclass(policy, learned.Learned)
    shape = {key: base[key] for key in ("num_layers", "num_kv_heads", "hidden_size")}
    gates = learned.new_gates(policy, delay=0 if name == "dmc" else 32, base=base, **shape)
    for layer in gates.outer:
        torch.nn.init.constant_(layer.bias, 5.0)
    gates.save_pretrained(tmp_path)
    method = methods.parse(f"{name}:gates={tmp_path}")
    expected, memory = run(method, loaded, ids)
    assert memory.kept is not None
    assert all(kept == (1 if name == "dmc" else 33) for layer in memory.kept for kept in layer)
    assert memory.allocated_bytes < memory.full_bytes / 8
    with method.open(loaded) as session:
        session.prefill(ids[:, :PROMPT])
        with session.fork() as fork:
            fork.decode(ids[:, :30])
        torch.testing.assert_close(session.decode(ids[:, PROMPT:]), expected[:, 1:], atol=1e-5, rtol=1e-4)


def test_random_eviction_is_within_its_ratio(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """It keeps a quarter, drawn anew for each seed, in every head."""
    _, memory = run(methods.parse("random:ratio=4"), loaded, ids)
    assert memory.claimed_bytes <= memory.full_bytes / 4
    assert memory.kept is not None
    assert all(0 < kept <= (PROMPT + MORE) / 4 for layer in memory.kept for kept in layer)
    other, _ = run(methods.parse("random:ratio=4,seed=1"), loaded, ids)
    assert not torch.equal(other, run(methods.parse("random:ratio=4"), loaded, ids)[0])


def test_storage_bytes() -> None:
    """Storages count once and whole, wherever they hang."""

    class Holder:
        def __init__(self) -> None:
            base = torch.zeros(100)
            self.view = base[:3]
            self.parts = [base[50:], {"other": torch.zeros(7, dtype=torch.int8)}]

    assert storage_bytes(Holder()) == 407
    assert storage_bytes([torch.zeros(2), torch.zeros(2)]) == 16
    assert storage_bytes("text") == 0


def test_quantized_cache_holds_fewer_bytes(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """4 bits and a scale and a shift for each group: the walk finds the codes inside quanto's tensors."""
    pytest.importorskip("optimum.quanto")
    with methods.parse("quantized:bits=4,group=16,residual=16").open(loaded) as session:
        session.prefill(ids)  # and no decode: to read its codes back, quanto would compile C++ for minutes
        memory = session.memory()
    assert memory.full_bytes / 8 < memory.allocated_bytes < memory.full_bytes / 2.5


# ---- kvpress's side, with a stand-in for kvpress: the protocol, not the presses


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Python whose kvpress has one press, which keeps the latest entries, and one that fails."""
    package = tmp_path / "site" / "kvpress"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        textwrap.dedent(
            """
            import contextlib

            class StreamingLLMPress:
                def __init__(self, compression_ratio):
                    self.removed = compression_ratio

                @contextlib.contextmanager
                def __call__(self, model):
                    def hook(module, args, kwargs, output):
                        layer = (kwargs.get("past_key_values") or kwargs.get("cache")).layers[module.layer_idx]
                        kept = max(1, int(layer.keys.shape[2] * (1 - self.removed)))
                        layer.keys = layer.keys[:, :, -kept:].contiguous()
                        layer.values = layer.values[:, :, -kept:].contiguous()
                    hooks = [m.self_attn.register_forward_hook(hook, with_kwargs=True) for m in model.model.layers]
                    yield
                    for handle in hooks:
                        handle.remove()

            class SnapKVPress(StreamingLLMPress):
                def __call__(self, model):
                    raise RuntimeError("this press is broken")

            ObservedAttentionPress = TOVAPress = KeyDiffPress = ExpectedAttentionPress = KVzipPress = StreamingLLMPress
            """
        )
    )
    information = tmp_path / "site" / "kvpress-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} -W ignore "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv(peers.ENVIRONMENT, str(python))
    yield python
    peers.end_workers()


@pytest.fixture
def saved(loaded: LoadedModel, tmp_path: Path) -> LoadedModel:
    """The model in a folder, as the worker needs it."""
    from transformers import AutoModelForCausalLM

    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    return LoadedModel("bytes", model, loaded.tokenizer, "a test")


def test_worker_without_compression_is_the_reference(
    stand_in: Path, saved: LoadedModel, loaded: LoadedModel, ids: torch.Tensor
) -> None:
    """Tokens there, logits back: at ratio 1 nothing is evicted and the logits are DynamicCache's."""
    expected, plain = run(methods.parse("dynamic"), loaded, ids)
    got, memory = run(methods.parse("streaming:ratio=1"), saved, ids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (memory.full_bytes, memory.allocated_bytes) == (plain.full_bytes, plain.allocated_bytes)
    assert peers.worker_versions()["kvpress"] == "0"


def test_worker_keeps_positions_and_counts_bytes(
    stand_in: Path, saved: LoadedModel, loaded: LoadedModel, ids: torch.Tensor
) -> None:
    """The latest quarter of the prompt and all that follows, where they were: a masked forward gives the same."""
    got, memory = run(methods.parse("streaming:ratio=4"), saved, ids)
    start = PROMPT - PROMPT // 4
    total = PROMPT + MORE
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    visible[PROMPT:, :start] = False  # the prompt's own queries saw everything
    from tests import reference

    expected = reference.forward(loaded.model, ids[0], visible)[PROMPT - 1 :]
    torch.testing.assert_close(got[0], expected, atol=1e-4, rtol=1e-3)
    assert memory.allocated_bytes == memory.claimed_bytes
    assert memory.allocated_bytes == memory.full_bytes * (PROMPT // 4 + MORE) // (PROMPT + MORE)


def test_worker_forks(stand_in: Path, saved: LoadedModel, ids: torch.Tensor) -> None:
    """As for every method."""
    expected, _ = run(methods.parse("streaming:ratio=4"), saved, ids)
    with methods.parse("streaming:ratio=4").open(saved) as session:
        session.prefill(ids[:, :PROMPT])
        with session.fork() as fork:
            fork.prefill(ids[:, :50])  # a further turn is not compressed
        torch.testing.assert_close(session.decode(ids[:, PROMPT:]), expected[:, 1:])


def test_a_broken_press_says_so_and_the_worker_goes_on(stand_in: Path, saved: LoadedModel, ids: torch.Tensor) -> None:
    """Its error comes over, with its words; the next press runs."""
    with pytest.raises(PeerError, match="this press is broken"):
        run(methods.parse("snapkv:ratio=4"), saved, ids)
    run(methods.parse("streaming:ratio=4"), saved, ids)


def test_a_dead_worker_says_so(stand_in: Path, saved: LoadedModel, ids: torch.Tensor) -> None:
    """Not a hang, not a broken pipe."""
    with methods.parse("streaming:ratio=4").open(saved) as session:
        session.prefill(ids[:, :PROMPT])
        peers.end_workers()
        with pytest.raises(PeerError, match="ended"):
            session.decode(ids[:, PROMPT:])
        session.close = lambda: None  # type: ignore[method-assign]  # there is nobody left to tell


def test_no_python_for_peers(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is one command."""
    monkeypatch.setenv(peers.ENVIRONMENT, os.devnull + "/python")
    with pytest.raises(OptionError, match="make peers"):
        methods.parse("snapkv:ratio=4").open(loaded)
