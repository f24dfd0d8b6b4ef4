"""What a retrofit run writes: resumable checkpoints, adapters, full weights, metrics."""

import copy
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpleat.errors import ModelError, OptionError
from kvpleat.policies.lora import PREFIX
from kvpleat.retrofit.distributed import Processes, part_of, whole

if TYPE_CHECKING:
    from kvpleat.retrofit.run import Run

STATE_FILE, TENSORS_FILE = "state.json", "state.safetensors"


def save(run: "Run", folder: Path) -> None:
    """Write everything that the run needs to go on bit for bit. An older checkpoint is replaced once this is complete.

    Every process has to ask; the main one writes.
    """
    main = run.processes.main
    tensors = _gathered({f"trained.{name}": p for name, p in run.trained().items()}, main)
    for index, values in run.optimizer.state_dict()["state"].items():
        named = {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors |= _gathered(named, main)
    if not main:
        return
    part = _beside(folder, "part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / TENSORS_FILE)
    state = {**_identity(run), "step": run.step, "tokens": run.tokens, "batches": run.batches.state()}
    (part / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    old = _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def find(folder: Path, processes: Processes) -> Path | None:
    """The newest complete checkpoint at `folder`: what was there before, where a save was interrupted; None: none.

    Raises:
        ModelError: some processes see another one than others.
    """
    places = folder, _beside(folder, "old")
    found = next((i for i, place in enumerate(places) if place.is_dir()), len(places))
    mean = processes.mean(torch.tensor(float(found), device=processes.device))
    if processes.any(float(mean) != found):
        raise ModelError(
            f"Process {processes.rank} of {processes.size} does not see the same checkpoint in {folder.parent} as the "
            "others, so they would not do the same steps. Let all processes write to one shared folder."
        )
    return places[found] if found < len(places) else None


def load(run: "Run", folder: Path, any_steps: bool = False) -> None:
    """Put a run where `save` left it. `any_steps`: with the number of steps that was fitted then.

    Raises:
        ModelError: the checkpoint is of another recipe, model or number of processes, or damaged.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"The checkpoint {folder} cannot be read: {error}. Remove it to start the run again."
        ) from error
    if any_steps:
        run.recipe = replace(run.recipe, steps=state["recipe"]["steps"])
    for what, mine in _identity(run).items():
        if state[what] != mine:
            raise ModelError(
                f"The checkpoint {folder} was written with {what} {state[what]} and this run has {mine}; going on "
                "would be another run. Pass the same options, or another --out."
            )
    trained = run.trained()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(part_of(tensors[f"trained.{name}"], parameter))
    order = [p for group in run.optimizer.param_groups for p in group["params"]]
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            of_shape = tensor.shape == order[int(index)].shape
            kept.setdefault(int(index), {})[key] = part_of(tensor, order[int(index)]) if of_shape else tensor
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": kept})
    run.step, run.tokens = state["step"], state["tokens"]
    run.batches.load_state(state["batches"])


def _identity(run: "Run") -> dict[str, Any]:
    """What a run shares with the runs it may go on from."""
    recipe: dict[str, Any] = json.loads(json.dumps(asdict(run.recipe)))
    return {"recipe": recipe, "base": run.base, "processes": run.processes.size}


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")


def _gathered(tensors: dict[str, Tensor], main: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies on the CPU, put together from their shards; the main process alone keeps them."""
    kept = {}
    for name, x in tensors.items():
        full = whole(x.detach())
        if main:
            narrow = dtype if dtype is not None and full.is_floating_point() else full.dtype
            kept[name] = full.to("cpu", narrow).contiguous().clone()
    return kept


def frozen_copy(model: Any) -> Any:
    """A copy of the model that is never trained."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def save_adapter(adapted: Any, folder: Path, main: bool = True) -> None:
    """Write the adapters in PEFT's own layout, weights in float16; every process asks, the main one writes."""
    from peft import get_peft_model_state_dict

    state = _gathered(get_peft_model_state_dict(adapted), main, torch.float16)
    if not main:
        return
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
    """Names of the adapted modules in the causal LM."""
    return {name.removeprefix(PREFIX).partition(".lora_")[0] for name in state}


def save_model(model: Any, folder: Path, main: bool = True) -> None:
    """Write all weights of a model that was trained whole, in bfloat16; every process asks, the main one writes."""
    tensors = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}  # tied weights are one tensor
    state = _gathered({n: x for n, x in tensors.items() if first[id(x)] == n}, main, torch.bfloat16)
    if main:
        model.save_pretrained(folder / "model", state_dict=state)


class Metrics:
    """metrics.jsonl, a line a step, and TensorBoard files beside it.

    Args:
        folder: where to.
        step: the run goes on after this one; what was written of later steps is dropped.
        main: False: nothing is written.

    Raises:
        OptionError: tensorboard is missing.
    """

    def __init__(self, folder: Path, step: int = 0, main: bool = True) -> None:
        self._file: TextIO | None = None
        self._board: Any = None
        if not main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise OptionError(
                "Curves are written for TensorBoard, which is not installed. Run: pip install 'kvpleat[retrofit]'"
            ) from None
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, figures: dict[str, Any]) -> None:
        """Add a line; numbers go to the board at its "step"."""
        if self._file is None:
            return
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, figures["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
