"""The processes that work together: who takes which contexts, what they add up, how weights are spread.

An evaluation shares its documents out and gathers the answers; that is `part` and `gather`. The rest is for training.
Training is data-parallel: every process has the whole compressor, takes its share of each step's contexts, and adds
its gradient to the others'. What is trained is small and always called through one `forward`, so this is one
all-reduce of one flat fp32 tensor, and torch's DDP wrapper would only hide it. The frozen model has no gradient to
share. Where it fits into one device, each process has its own (ddp). Where not, each block's weights are spread over
the processes of a host and brought together when the block runs (fsdp); the embedding and the head stay whole: of an
8B Llama in bf16 they are 2.1 GB of 16, and the loss reads the head chunk by chunk. No weights travel between hosts.
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

from run.errors import BadInput
from run.models import pick_device
from model import Llama


@dataclass
class World:
    """The processes that work together, as torchrun tells through the environment; by default, one."""
    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0              # rank among the processes of this host
    local_world_size: int = 1

    @classmethod
    def start(cls, device: str) -> "World":
        """Join the others; device: --device. Errors: BadInput where this device cannot take part."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
                raise BadInput(f"{os.environ['SLURM_STEP_NUM_TASKS']} tasks of one job step would each work alone; "
                               "start torchrun with one task per host (README)")
            return cls(pick_device(device))
        rank, size, local, local_size = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK",
                                                                      "LOCAL_WORLD_SIZE"))
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if device not in ("cuda", "cpu", "mps"):
            raise BadInput(f"--device {device} with torchrun: expected cuda (each process takes its own GPU) or cpu")
        if device == "mps":
            raise BadInput("--device mps is one GPU and speaks to no other process; run without torchrun, "
                           "or use --device cpu")
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise BadInput(f"{local_size} processes and {torch.cuda.device_count()} GPUs on this host; lower "
                               "--nproc_per_node")
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=1))
        if rank:
            sys.stdout = open(os.devnull, "w")  # one process speaks; errors come from all
        return cls(pick_device(device), rank, size, local, local_size)

    def end(self) -> None:
        """Processes leave together: nobody's connections close while another still works."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    @contextmanager
    def one_first(self):
        """One process of each host runs the block before the others, which then find its files."""
        if self.world_size > 1 and self.local_rank:
            dist.barrier()
        try:
            yield
        finally:  # where it failed, it will fail for the others as well, who then say why
            if self.world_size > 1 and not self.local_rank:
                dist.barrier()

    def broadcast(self, value):
        """The first process's value (any picklable), in all of them."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def on_rank0(self, make):
        """make() in the first process alone; what it returns, or the BadInput it raises, in all of them."""
        value = error = None
        if not self.rank:
            try:
                value = make()
            except BadInput as e:
                error = str(e)
        value, error = self.broadcast((value, error))
        if error is not None:
            raise BadInput(error)
        return value

    def gather(self, rows: list) -> list:
        """The rows (any picklable) of all processes, in each of them."""
        parts = [rows]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def part(self, rows: list) -> list:
        """This process's rows: 0, 1, 1, 0, 0, 1 … for two, as rows that come in turn from two sources differ in how
        long they take."""
        turn = 2 * self.world_size
        return [row for i, row in enumerate(rows) if i % turn in (self.rank, turn - 1 - self.rank)]

    def sum(self, x):
        """x, summed in place over the processes."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def shard(self, model: Llama) -> None:
        """Spread each block's weights over the processes of this host. The model may still be without memory."""
        mesh = init_device_mesh(self.device.type, (self.world_size // self.local_world_size, self.local_world_size),
                                mesh_dim_names=("hosts", "shards"))["shards"]
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        # the model as the root: with it, weights of the next block travel while this one computes. A context is read by
        # `run_layers`, everything else by `forward`
        fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if not isinstance(p, DTensor)})
        register_fsdp_forward_method(model, "run_layers")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody here writes into
