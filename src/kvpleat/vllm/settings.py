"""What a user of vLLM asks kvpleat for, and what cannot work.

    vllm serve MODEL --hf-overrides '{"architectures": ["KvpleatLlamaForCausalLM"],
                                      "kvpleat": {"policy": "dms", "ratio": 4}}'
                     --kv-transfer-config '{"kv_connector": "KvpleatConnector", "kv_role": "kv_producer"}'

`kvpleat serve MODEL --policy dms --ratio 4` makes that command.
"""

import re
from dataclasses import dataclass
from typing import Any

from kvpleat.errors import OptionError, UnsupportedError
from kvpleat.policies import Policy, from_dict
from kvpleat.types import PAGE_SIZES, Delay

KEY = "kvpleat"  # of the model's config
CONNECTOR = "KvpleatConnector"
# Of the connector. vLLM takes any other role for one that loads entries from elsewhere, and then, where steps overlap,
# gives blocks of preempted requests back a step late: 0.26 to 0.29 then preempt one after the other to no avail.
ROLE = "kv_producer"
PREFIX = "Kvpleat"  # of names of model classes
# vLLM's own name of a model class -> transformers' model_type
ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
VERSIONS = (26, 33)  # minor versions of vLLM 0.x: the first one, and the first that is too new
LEARNED = ("dms", "fold", "dmc")
DTYPES = ("auto", "bfloat16", "float16", "float32")  # --kv-cache-dtype
# why settings of vLLM cannot be
TAKEN_BACK = "a guessed token that is wrong would have to be taken out of a compressed cache again"
PLACES = "it finds pages by token positions, at which those of a compressed request do not lie"
ONE_DEVICE = "a KV head's entries, and what its gates decided, must lie on one device"
ENTRIES = "entries are kept in 16 or 32 bits, as the model computes them"
BLOCKS = "a block is a page of each KV head, and the kernels know pages of other sizes"
WEIGHTS = "gates were trained with one set of weights"
SLEEP = "a server that sleeps drops its KV cache, and with it what says which pages are free"
BACKEND = "kvpleat brings the attention that reads its cache, so this one would never run"


@dataclass(frozen=True)
class Settings:
    """A policy inside vLLM.

    Args:
        policy: a learned one, without its gates yet; None: a window.
        delay: of a window; None where gates say more.
    """

    policy: Policy | None
    delay: Delay | None

    @classmethod
    def of(cls, config: Any) -> "Settings":
        """Read a model's config (transformers' one, as vLLM has it).

        Raises:
            OptionError: there are none, or they say what cannot be.
        """
        options = getattr(config, KEY, None)
        if not isinstance(options, dict):
            raise OptionError(
                f"The model's config says {KEY}={options!r}, so there is no policy. Pass --hf-overrides "
                f'\'{{"architectures": [...], "{KEY}": {{"policy": "dms", "ratio": 4}}}}\', or use `kvpleat serve`.'
            )
        return cls.parse(options)

    @classmethod
    def parse(cls, options: dict[str, Any]) -> "Settings":
        """Read {"policy": name, **options of that policy}.

        Raises:
            OptionError: no such policy, or no such options of it. UnsupportedError: a policy that vLLM cannot run.
        """
        options = dict(options)
        name = options.pop("policy", None)
        if name == "window":
            return cls(None, _window(options))
        if name not in LEARNED:
            raise UnsupportedError(
                f"policy={name!r} inside vLLM: {_why(name)} Policies that work there: {', '.join(LEARNED)}, window."
            )
        policy = from_dict({"name": name, **options})
        if policy.bits is not None:
            raise UnsupportedError(
                f"bits={policy.bits} inside vLLM: entries stay in the model's dtype there. Leave it out, or use "
                "kvpleat.compress."
            )
        if policy.reads_model:
            raise UnsupportedError(
                "gates='model' are channels of the model's own; inside vLLM only gates beside it are read. Pass a name "
                "or a folder of gates, or use kvpleat.compress."
            )
        return cls(policy, None)


def _why(name: Any) -> str:
    if name == "attention":
        return (
            "AttentionScore looks at the last queries at moments, which a CUDA graph of vLLM's would have to do for "
            "all rows in every step. Use kvpleat.LLM for it."
        )
    return "full needs no kvpleat." if name == "full" else "it is not known."


def _window(options: dict[str, Any]) -> Delay:
    """A window that slides by one token: every entry leaves when it is so old, but for the first ones."""
    given = {"budget": None, "sinks": 4} | options
    budget, sinks, *others = given.values()
    if others or type(budget) is not int or type(sinks) is not int or not 0 <= sinks <= budget - 2:
        raise OptionError(
            f"window with {', '.join(f'{name}={value!r}' for name, value in given.items())}: inside vLLM it takes "
            "exactly budget, a number of entries that each stream keeps, and sinks, how many of them are the first "
            'ones. Pass {"policy": "window", "budget": 1024, "sinks": 4}.'
        )
    return Delay(budget - sinks - 1, sinks=sinks)


def base_of(config: Any) -> dict[str, Any]:
    """What `kvpleat.hf.families.base_of` says of the same model, from its config alone: the keys of `gates.BASE`."""
    heads = int(config.num_attention_heads)
    return {
        "family": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "num_q_heads": heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def check_version(version: str) -> None:
    """Raise UnsupportedError for a version of vLLM that kvpleat was not tested with."""
    found = re.match(r"0\.(\d+)\.", version)
    if not found or not VERSIONS[0] <= int(found[1]) < VERSIONS[1]:
        raise UnsupportedError(
            f"vLLM {version}: kvpleat plugs into parts of vLLM that change from one version to the next, and was "
            f"tested with 0.{VERSIONS[0]} to 0.{VERSIONS[1] - 1}. Install one of those, or a newer kvpleat."
        )


def check(vllm_config: Any) -> None:
    """Refuse settings of vLLM that cannot work beside kvpleat.

    Raises:
        OptionError, UnsupportedError: naming the setting and what to pass instead.
    """
    connector = vllm_config.kv_transfer_config
    right = f'--kv-transfer-config \'{{"kv_connector": "{CONNECTOR}", "kv_role": "{ROLE}"}}\''
    if connector is None or connector.kv_connector != CONNECTOR:
        raise OptionError(
            f"kv_connector is {connector and connector.kv_connector!r}: workers could not tell the scheduler how much "
            f"memory requests need. Pass {right} instead. Of another connector: {PLACES}."
        )
    if connector.kv_role != ROLE:
        raise OptionError(
            f"kv_role is {connector.kv_role!r}: vLLM would take kvpleat for something that loads entries, and give "
            f"blocks of preempted requests back too late for those that wait. Pass {right}."
        )
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    guesses = vllm_config.speculative_config
    for said, wrong, why, remedy in (
        (f"speculative decoding ({getattr(guesses, 'method', None)})", guesses is not None, TAKEN_BACK,
         "leave out --speculative-config"),
        (f"decode_context_parallel_size={parallel.decode_context_parallel_size}",
         parallel.decode_context_parallel_size > 1, ONE_DEVICE, "leave it out"),
        (f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}",
         parallel.prefill_context_parallel_size > 1, ONE_DEVICE, "leave it out"),
        (f"kv_cache_dtype={cache.cache_dtype}", cache.cache_dtype not in DTYPES, ENTRIES, "leave out --kv-cache-dtype"),
        (f"block_size={cache.block_size}", cache.block_size not in (None, *PAGE_SIZES), BLOCKS,
         f"pass --block-size {PAGE_SIZES[0]} or {PAGE_SIZES[1]}"),
        (f"kv_offloading_size={cache.kv_offloading_size}", cache.kv_offloading_size is not None, PLACES,
         "leave out --kv-offloading-size"),
        ("enable_sleep_mode", vllm_config.model_config.enable_sleep_mode, SLEEP, "leave out --enable-sleep-mode"),
        ("a LoRA of vLLM's (enable_lora)", vllm_config.lora_config is not None, WEIGHTS,
         "merge it into the model and leave out --enable-lora"),
    ):  # fmt: skip
        if wrong:
            raise UnsupportedError(f"{said}: kvpleat cannot serve with it inside vLLM, because {why}. Please {remedy}.")
