"""Peak activation memory of a method, in a fresh process: what the process grows by at most during one forward.

As in `kvpleat.bench.memory`: pages of the process on a CPU (Linux), torch's allocator on a GPU. Before it all weights
are read, since a file's pages count once they were (20 MiB of MiniLM's embeddings would), and a small forward makes
what libraries allocate once.
"""

from typing import Any

import torch

from kvpleat.bench.encoder.methods import parse
from kvpleat.bench.memory import answer_request, in_fresh_process
from kvpleat.bench.methods.peer_worker import process_bytes
from kvpleat.hf.embed import batch_of, pad_of, pool
from kvpleat.hf.models import LoadedModel, load_encoder

WARM = 2  # texts of the first forward


def peak_bytes(loaded: LoadedModel, spec: str, rows: list[list[int]]) -> int:
    """Bytes that encoding these texts in one batch takes at most, beyond weights and inputs.

    Raises:
        JudgeError: the process failed or ran out of memory.
    """
    dtype, device = str(loaded.model.dtype).removeprefix("torch."), str(loaded.model.device)
    request = {"model": loaded.name, "spec": spec, "rows": rows, "dtype": dtype, "device": device}
    what = f"{spec} with {len(rows)} texts of {max(map(len, rows))} tokens"
    return in_fresh_process("kvpleat.bench.encoder.memory", request, what)["peak_bytes"]


@torch.inference_mode()
def _measure(request: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(request["threads"])
    loaded = load_encoder(request["model"], dtype=request["dtype"], device=request["device"], progress=False)
    method, device = parse(request["spec"]), loaded.model.device
    rows = method.cut(request["rows"])
    found = {}
    for weight in loaded.model.parameters():
        weight.sum()
    with method.on(loaded.model):
        for places in (list(range(min(WARM, len(rows)))), list(range(len(rows)))):
            batch = batch_of(rows, places, pad_of(loaded), device)
            before = process_bytes(device, reset_peak=True)["peak_bytes"]
            pool(loaded.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state, batch.mask)
            found = {"peak_bytes": process_bytes(device)["peak_bytes"] - before}
    return found


if __name__ == "__main__":
    answer_request(_measure)
