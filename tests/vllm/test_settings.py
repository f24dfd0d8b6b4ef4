"""What is asked for, and what is refused. Where vLLM is not installed the tests that start it are skipped."""

import logging
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpleat.errors import KvpleatError, OptionError, UnsupportedError
from kvpleat.policies import DMS, Fold
from kvpleat.types import PAGE_SIZES, Delay
from kvpleat.vllm import plugin, settings
from kvpleat.vllm.settings import Settings

ROOT = Path(__file__).parents[2]

# ---- what is asked for


def test_a_learned_policy_by_ratio_or_by_gates() -> None:
    """As its class takes them."""
    assert Settings.parse({"policy": "dms", "ratio": 4}) == Settings(DMS(ratio=4), None)
    assert Settings.parse({"policy": "fold", "gates": "folder"}) == Settings(Fold(gates="folder"), None)


def test_a_window_keeps_budget_entries_with_the_newest_among_them() -> None:
    """One is the token's own, four are the first ones: the others leave when they are 59 tokens old."""
    assert Settings.parse({"policy": "window", "budget": 64}) == Settings(None, Delay(59, sinks=4))
    assert Settings.parse({"policy": "window", "budget": 3, "sinks": 1}).delay == Delay(1, sinks=1)


def test_what_is_asked_for_is_not_changed() -> None:
    """vLLM reads its config again in other processes."""
    options = {"policy": "dms", "ratio": 4}
    Settings.of(SimpleNamespace(kvpleat=options))
    assert options == {"policy": "dms", "ratio": 4}


REFUSED: list[tuple[dict[str, Any], type[KvpleatError], str]] = [
    ({}, UnsupportedError, "policy=None inside vLLM: it is not known.*dms, fold, dmc, window"),
    ({"policy": "snapkv"}, UnsupportedError, "policy='snapkv'.*not known.*dms, fold, dmc, window"),
    ({"policy": "full"}, UnsupportedError, "policy='full'.*needs no kvpleat"),
    ({"policy": "attention", "ratio": 4}, UnsupportedError, r"policy='attention'.*CUDA graph.*kvpleat\.LLM"),
    ({"policy": "dms"}, OptionError, "exactly one"),
    ({"policy": "dms", "ratio": 4, "gates": "folder"}, OptionError, "exactly one"),
    ({"policy": "dms", "ratio": 0.5}, OptionError, r"ratio=0\.5"),
    ({"policy": "dms", "ratios": 4}, OptionError, "ratios"),
    ({"policy": "dms", "ratio": 4, "bits": 4}, UnsupportedError, "bits=4.*Leave it out"),
    ({"policy": "window"}, OptionError, "budget=None, sinks=4"),
    ({"policy": "window", "budget": 0}, OptionError, "budget=0"),
    ({"policy": "window", "budget": 5, "sinks": 4}, OptionError, "budget=5, sinks=4"),
    ({"policy": "window", "budget": 64, "sinks": -1}, OptionError, "sinks=-1"),
    ({"policy": "window", "budget": "64"}, OptionError, "budget='64'"),
    ({"policy": "window", "budget": True}, OptionError, "budget=True"),
    ({"policy": "window", "budget": 64, "ratio": 4}, OptionError, "budget=64, sinks=4, ratio=4.*exactly budget"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_policies_that_cannot_be(options: dict[str, Any], error: type[KvpleatError], message: str) -> None:
    """The value, the consequence and the remedy."""
    with pytest.raises(error, match=f"(?s){message}"):
        Settings.parse(options)


@pytest.mark.parametrize("said", [None, "dms", 4])
def test_a_config_that_does_not_say_a_policy(said: Any) -> None:
    """One of our models without our settings: the message has them."""
    config = SimpleNamespace() if said is None else SimpleNamespace(kvpleat=said)
    with pytest.raises(OptionError, match=f"kvpleat={said!r}.*--hf-overrides.*kvpleat serve"):
        Settings.of(config)


# ---- versions and names


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.32.1.dev3+gabc", "0.29.0rc1"])
def test_versions_that_were_tested(version: str) -> None:
    """Release candidates and builds of them too."""
    settings.check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "0.9.2", "1.0.0", "dev", "10.30.0"])
def test_versions_that_were_not(version: str) -> None:
    """Said when vLLM loads the plugin."""
    with pytest.raises(UnsupportedError, match=rf"vLLM {version}.*tested with 0\.26 to 0\.32\. Install one of those"):
        settings.check_version(version)


def test_the_entry_point_is_declared_and_the_range_of_versions_with_it() -> None:
    """vLLM finds the plugin by this group."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"kvpleat": "kvpleat.vllm.plugin:register"}


# ---- settings of vLLM


def config(**changes: Any) -> SimpleNamespace:
    """vLLM's, as far as `check` reads it, with changes by dotted name."""
    made = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector=settings.CONNECTOR, kv_role=settings.ROLE),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        cache_config=SimpleNamespace(
            cache_dtype="auto", block_size=16, kv_offloading_size=None, enable_prefix_caching=False
        ),
        speculative_config=None,
        lora_config=None,
        attention_config=SimpleNamespace(backend=None),
        model_config=SimpleNamespace(
            enable_sleep_mode=False, hf_config=SimpleNamespace(kvpleat={"policy": "window", "budget": 64})
        ),
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        target = made
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return made


def test_settings_that_work() -> None:
    """Both page sizes, and the dtypes of models."""
    for size in PAGE_SIZES:
        settings.check(config(cache_config__block_size=size))
    for dtype in ("auto", "bfloat16", "float16", "float32"):
        settings.check(config(cache_config__cache_dtype=dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_transfer_config": None}, "kv_connector is None.*--kv-transfer-config.*KvpleatConnector"),
        ({"kv_transfer_config__kv_role": "kv_both"}, "kv_role is 'kv_both'.*kv_producer"),
        ({"kv_transfer_config__kv_connector": "NixlConnector"}, "'NixlConnector'.*KvpleatConnector.*token positions"),
        (
            {"speculative_config": SimpleNamespace(method="ngram")},
            r"speculative decoding \(ngram\).*taken out of a compressed cache.*leave out --speculative-config",
        ),
        (
            {"parallel_config__decode_context_parallel_size": 2},
            "decode_context_parallel_size=2.*one device.*leave it out",
        ),
        (
            {"parallel_config__prefill_context_parallel_size": 4},
            "prefill_context_parallel_size=4.*one device.*leave it out",
        ),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype=fp8.*16 or 32 bits.*leave out --kv-cache-dtype"),
        ({"cache_config__block_size": 128}, "block_size=128.*kernels.*--block-size 16 or 32"),
        ({"cache_config__kv_offloading_size": 4.0}, r"kv_offloading_size=4\.0.*token positions.*--kv-offloading-size"),
        ({"model_config__enable_sleep_mode": True}, "enable_sleep_mode.*pages are free.*--enable-sleep-mode"),
        ({"lora_config": object()}, "LoRA.*one set of weights.*merge it into the model"),
    ],
)
def test_settings_that_do_not(changes: dict[str, Any], message: str) -> None:
    """Each is named with its value, what would come of it, and what to pass instead."""
    with pytest.raises((OptionError, UnsupportedError), match=f"(?s){message}"):
        settings.check(config(**changes))


def test_an_attention_of_vllms_is_refused_where_the_user_asks() -> None:
    """It would be replaced without a word. Workers do not look: there vLLM may have named one itself."""
    asked = config(attention_config__backend=SimpleNamespace(name="FLASH_ATTN"))
    with pytest.raises(
        UnsupportedError, match=r"attention_backend=FLASH_ATTN.*never run.*leave out --attention-backend"
    ):
        plugin.check_early(asked)
    settings.check(asked)


@pytest.mark.parametrize("on", [True, False])
def test_prefix_caching_is_switched_off_with_a_line_in_the_log(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has it on by default, and by then does not know whether anybody asked for it."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.kvpleat"), "warning", lambda text, *args: said.append(text % args))
    asked = config(cache_config__enable_prefix_caching=on)
    plugin.check_early(asked)
    plugin.check_early(asked)
    assert not asked.cache_config.enable_prefix_caching
    assert len(said) == int(on)
    assert all("switched prefix caching off" in x and "--no-enable-prefix-caching" in x for x in said)
