"""Several processes at one run: who is who, weights in shards (FSDP2), and what the processes tell each other.

`accelerate launch` or torchrun starts them (on CPUs torchrun: accelerate starts one there) and says in the environment
which is which; accelerate joins them. Rows are dealt to processes, weights and optimiser state are cut into as many
shards. The run is the one that a single process would do on all rows: noise belongs to a row, and means are over all
rows and tokens.

Sharding itself is torch's `fully_shard`, because accelerate's `prepare` shards on GPUs only, and then what is tested on
CPUs would be another program. So of accelerate's config file the number of processes and machines count; how a model is
sharded does not follow it.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kvpleat.errors import OptionError


class Processes:
    """The processes of a run, this one among them. One process needs neither accelerate nor a process group.

    Args:
        device: where this process's model is.

    Attributes:
        rank, size: this process's number, and how many there are.

    Raises:
        OptionError: accelerate is missing, or the model is on another process's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = (int(os.environ.get(name, start)) for name, start in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device = device
        self._accelerator: Any = _join(device) if self.size > 1 else None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def shard(self, root: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Cut all parameters below `root` into shards, in place. Each of `layers` is put together when it runs, and
        the rest while `root` runs: outside its forward and backward every parameter is a DTensor."""
        if self._accelerator is None:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(root, mesh=mesh, reshard_after_forward=True)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a tensor over all processes."""
        if self._accelerator is None:
            return x
        mean: Tensor = self._accelerator.reduce(x, "mean")
        return mean

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def _join(device: torch.device) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin
    except ImportError:
        raise OptionError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: several processes need accelerate, which is not installed. Run: "
            "pip install 'kvpleat[retrofit]'"
        ) from None
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, cpu_offload=False)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", fsdp_plugin=plugin)
    if device.type != "cpu" and accelerator.device != device:
        raise OptionError(
            f"The model is on {device}, and process {accelerator.process_index} works on {accelerator.device}; two "
            f"processes would share a GPU. Load the model on cuda:{accelerator.local_process_index}."
        )
    return accelerator


def whole(x: Tensor) -> Tensor:
    """A tensor put together from its shards; every process has to ask. One that is not sharded is returned as it is."""
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def part_of(x: Tensor, other: Tensor) -> Tensor:
    """`x`, whole on every process, sharded as `other` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
