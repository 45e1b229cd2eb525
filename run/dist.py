"""The processes that work together, as torchrun starts them.

An evaluation shares its documents out (my_rows) and gathers the answers.
Training is data-parallel: every process has the whole compressor and takes its
part of each step's contexts. The frozen model has no gradients to share. Where
it takes up to half of a device, every process has a copy (ddp). Where it takes
more, each block's weights are spread over the processes of a host and are gathered
while the block runs (fsdp, `shard`). The embedding and the output head stay whole:
of an 8B Llama they take 2.1 of 16 GB, and the loss uses the whole head once for
each chunk of tokens. No weights travel between hosts.
"""
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model import Llama
from run.errors import BadInput
from run.loading import pick_device


@dataclass
class World:
    """This process among all that work together; by default it is the only one.
    """
    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0        # rank among the processes of this host
    local_world_size: int = 1  # processes of this host

    @classmethod
    def start(cls, device: str) -> "World":
        """Join the other processes. device: --device.

        Errors: BadInput where this device cannot take part.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
            if int(tasks) > 1:
                raise BadInput(
                    f"{tasks} tasks of one job step would each work alone; start torchrun with one "
                    "task per host (run/README.md)")
            return cls(pick_device(device))

        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in names)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cuda", "cpu"):
            raise BadInput(
                f"--device {device} with torchrun: expected cuda (each process takes its "
                "own GPU) or cpu; run without torchrun for another device")

        backend = "gloo"
        if device == "cuda":
            count = torch.cuda.device_count()
            if local_rank >= count:
                raise BadInput(
                    f"{local_world_size} processes and {count} GPUs on this host; lower "
                    "--nproc_per_node")
            backend = "nccl"
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(hours=1))

        if rank:
            sys.stdout = open(os.devnull, "w")  # one process speaks; errors come from all
        return cls(pick_device(device), rank, world_size, local_rank, local_world_size)

    def end(self) -> None:
        """Leave together, so that nobody loses a connection that is in use."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    @contextmanager
    def local_rank0_first(self):
        """One process of each host runs the block first; the others find its files."""
        if self.world_size > 1 and self.local_rank:
            dist.barrier()
        try:
            yield
        finally:  # after an error, too: the others run into it themselves
            if self.world_size > 1 and not self.local_rank:
                dist.barrier()

    def broadcast(self, value):
        """The first process's value, in all processes. It must be picklable."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def on_rank0(self, make):
        """Call make() in the first process; all return its value.

        Errors: BadInput, in all processes, if make raised it.
        """
        value = error = None
        if not self.rank:
            try:
                value = make()
            except BadInput as bad:
                error = str(bad)
        value, error = self.broadcast((value, error))
        if error is not None:
            raise BadInput(error)
        return value

    def gather(self, rows: list) -> list:
        """The rows of all processes, in all processes. They must be picklable."""
        parts = [rows]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def my_rows(self, rows: list) -> list:
        """This process's rows. Two processes take them in the order 0, 1, 1, 0.

        Rows often alternate between two sources that take different times.
        """
        period = 2 * self.world_size
        mine = (self.rank, period - 1 - self.rank)
        return [row for i, row in enumerate(rows) if i % period in mine]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x, summed in place over the processes."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def shard(self, model: Llama) -> None:
        """Spread each block's weights over the processes of this host (FSDP2).

        The model may still be on the meta device.
        """
        hosts = self.world_size // self.local_world_size
        mesh = init_device_mesh(
            self.device.type, (hosts, self.local_world_size), mesh_dim_names=("hosts", "shards"))
        for block in model.layers:
            fully_shard(block, mesh=mesh["shards"])

        # With the model as the root, the next block's weights travel while this
        # block computes. It is entered by `forward` and by `run_layers`.
        whole = {p for p in model.parameters() if not isinstance(p, DTensor)}
        fully_shard(model, mesh=mesh["shards"], ignored_params=whole)
        register_fsdp_forward_method(model, "run_layers")
        # Nothing here writes into the view that the warning is about.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
