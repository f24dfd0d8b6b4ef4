"""Retrofits that one process does on all rows, or several do together: what tests of several processes compare.

Run as a program it starts two processes: python -m tests.retrofit.ranks FOLDER PORT
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing import start_processes

from kvpleat.retrofit import checkpoint
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.distributed import whole
from kvpleat.retrofit.measure import judge
from kvpleat.retrofit.run import Run
from kvpleat.retrofit.train import retrofit
from tests import models
from tests.retrofit.rows import Rows

SIZES, ROWS, STEPS = [17, 1, 30], 2, 4
COMMON: dict[str, Any] = {"ratios": (1.4,), "steps": STEPS, "length": sum(SIZES), "rate": 0.02, "rank": 2}
RECIPES = {
    "gates": Recipe(method="dms", train="gates", delay=5, accumulate=2, mlp_size=5, **COMMON),
    "lora": Recipe(method="fold", train="lora", delay=3, checkpointing=True, model_rate=3e-3, **COMMON),
    "full": Recipe(method="dmc", train="full", delay=0, lm_weight=0.1, model_rate=1e-3, **COMMON),
}
FAMILIES = {"gates": "gemma3_text", "lora": "gpt2", "full": "llama"}


def recipe_of(way: str, world_size: int) -> Recipe:
    return replace(RECIPES[way], rows=ROWS // world_size)


def run_of(way: str, rank: int = 0, world_size: int = 1) -> Run:
    model = models.tiny(FAMILIES[way], tie_word_embeddings=True)
    run = Run(model, recipe_of(way, world_size), Rows(ROWS // world_size, SIZES, rank, world_size))
    for group in run.optimizer.param_groups:
        # Adam makes full steps of gradients that are rounding alone, such as those of DMC's weights. With 1e-4 one
        # number was off by 1.4e-5, on some CPUs.
        group["eps"] = 1e-3
    return run


def held_out() -> list[Any]:
    return [next(Rows(2, SIZES))]


def results(way: str, place: Path, rank: int = 0, world_size: int = 1) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(figures of each step and of the judge; what was trained) of a run that is saved and resumed half way."""
    first = run_of(way, rank, world_size)
    with first.student.attached():
        figures = [first.advance()._asdict() for _ in range(STEPS // 2)]
    checkpoint.save(first, place / "checkpoint")
    first.processes.wait()
    run = run_of(way, rank, world_size)
    found = checkpoint.find(place / "checkpoint", run.processes)
    assert found is not None
    checkpoint.load(run, found)
    with run.student.attached():
        figures += [run.advance()._asdict() for _ in range(STEPS // 2)]
        judged = judge(run.lesson, held_out())
    run.save_gates(place / "gates", 1.4)
    trained = {name: whole(p.detach()).contiguous() for name, p in run.trained().items()}
    return {"steps": figures, "judged": judged, "tokens": run.tokens}, trained


def through(place: Path, rank: int = 0, world_size: int = 1) -> dict[str, dict[str, float]]:
    """A whole retrofit, which leaves its files in `place`."""
    model, rows = models.tiny("llama"), Rows(ROWS // world_size, SIZES, rank, world_size)
    recipe = recipe_of("gates", world_size)
    return retrofit(model, recipe, rows, place, held_out=held_out, save_every=2, deadline_s=1e9)


def of_two(rank: int, folder: Path, port: str) -> None:
    """What each of two processes does."""
    from accelerate import PartialState

    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(here, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    for way in RECIPES:
        figures, trained = results(way, folder / way, rank, 2)
        if rank == 0:
            (folder / way / "figures.json").write_text(json.dumps(figures))
            save_file(trained, folder / way / "trained.safetensors")
    measured = through(folder / "through", rank, 2)
    (folder / f"measured-{rank}.json").write_text(json.dumps(measured))
    PartialState().destroy_process_group()


if __name__ == "__main__":  # forked, so that what takes long to import is imported once
    start_processes(of_two, (Path(sys.argv[1]), sys.argv[2]), nprocs=2, start_method="fork")
