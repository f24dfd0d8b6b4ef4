"""What all tests share: no hub, and nothing of what the user has downloaded. Set before transformers is imported."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

_HF_HOME = tempfile.TemporaryDirectory(prefix="kvpleat-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _HF_HOME.name
if "KVPLEAT_TEST_GPU" not in os.environ:  # most tests hand tensors of a CPU to kernels, which are then interpreted
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))  # so that tests can import `tests.models` and `tests.reference`

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined

with warnings.catch_warnings():
    # Where hqq is installed transformers imports it, and its import uses what torch has deprecated: no fault of a test.
    warnings.simplefilter("ignore", DeprecationWarning)
    import transformers.cache_utils  # noqa: F401

from tests import interpreted, models  # noqa: E402

interpreted.patch_once()

torch.set_num_threads(1)  # tiny models on busy cores: threads that wait for each other take a hundred times longer


CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A small Llama with random weights, a word tokenizer and a chat template, as save_pretrained writes them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<unk>", "<|start|>", "<|end|>", "system", "user", "assistant", *(f"w{i}" for i in range(58))]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|start|>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_stays_attached() -> Iterator[None]:
    """After each test no tiny model of it carries anything of kvpleat: no implementation, no hook, no generate."""
    yield
    for model in models.made():
        name = type(model).__name__
        assert model.config._attn_implementation != "kvpleat", f"{name} kept the attention implementation"
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                owners = [getattr(hook, "__module__", "") or "" for hook in hooks.values()]
                assert not any(owner.startswith("kvpleat") for owner in owners), f"{name} kept a hook"
        assert "kvpleat" not in str(vars(model).get("generate", "")), f"{name} kept a generate"
