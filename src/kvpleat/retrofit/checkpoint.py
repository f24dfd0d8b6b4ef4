"""What a retrofit run writes: resumable checkpoints, adapters, full weights, metrics."""

import copy
import importlib.util
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpleat.errors import ModelError

if TYPE_CHECKING:
    from kvpleat.retrofit.train import Run

STATE_FILE, TENSORS_FILE = "state.json", "state.safetensors"


def save(run: "Run", folder: Path) -> None:
    """Write everything that the run needs to go on bit for bit; an older checkpoint is replaced once this is complete."""
    trained = run.trained()
    tensors: dict[str, Tensor] = {f"trained.{name}": p.detach() for name, p in trained.items()}
    optimizer = run.optimizer.state_dict()["state"]
    for index, values in optimizer.items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, part / TENSORS_FILE)
    state = {
        "recipe": _recipe(run),
        "base": run.base,
        "step": run.step,
        "tokens": run.tokens,
        "batches": run.batches.state(),
    }
    (part / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(run: "Run", folder: Path) -> None:
    """Put a run where `save` left it.

    Raises:
        ModelError: the checkpoint is of another recipe or model, or damaged.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"The checkpoint {folder} cannot be read: {error}. Remove it to start the run again."
        ) from error
    for what, mine in (("recipe", _recipe(run)), ("base", run.base)):
        if state[what] != mine:
            raise ModelError(
                f"The checkpoint {folder} was written with {what} {state[what]} and this run has {mine}; going on "
                "would be another run. Pass the same options, or another --out."
            )
    with torch.no_grad():
        for name, parameter in run.trained().items():
            parameter.copy_(tensors[f"trained.{name}"])
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            kept.setdefault(int(index), {})[key] = tensor
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": kept})
    run.step, run.tokens = state["step"], state["tokens"]
    run.batches.load_state(state["batches"])


def _recipe(run: "Run") -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(json.dumps(asdict(run.recipe)))
    return recipe


def frozen_copy(model: Any) -> Any:
    """A copy of the model that is never trained."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write the adapters in PEFT's own layout, weights in float16."""
    from peft import get_peft_model_state_dict

    state = {name: x.detach().half().cpu().contiguous() for name, x in get_peft_model_state_dict(adapted).items()}
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config = adapted.peft_config["default"].to_dict()
    config |= {
        "inference_mode": True,
        "base_model_name_or_path": None,
        "target_modules": sorted(_targets(state)),
    }
    text = json.dumps(config, indent=2, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _targets(state: dict[str, Tensor]) -> set[str]:
    """Names of the adapted modules, such as q_proj."""
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in state}


def save_model(model: Any, folder: Path) -> None:
    """Write all weights of a model that was trained whole, in float16's range-safe sibling bfloat16."""
    state = {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder / "model", state_dict=state)


class Metrics:
    """metrics.jsonl, a line a step, and TensorBoard files where tensorboard is installed."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, figures: dict[str, Any]) -> None:
        """Add a line; numbers go to the board at its "step"."""
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, figures["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
