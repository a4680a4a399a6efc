"""Several processes training one model: DDP or FSDP2 over torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kvlab.platform.jobs.context import Context, JobError


class Gang:
    """This process's place among the workers of its job; a gang of one needs no network.

    Attributes:
        rank: 0 to workers - 1; rank 0 logs, checkpoints and publishes.
    """

    def __init__(self, rank: int, workers: int, device: torch.device) -> None:
        self.rank, self.workers, self.device = rank, workers, device

    def wrap(self, module: nn.Module, parallel: str) -> nn.Module:
        """Return the module that `parallel` ("ddp" or "fsdp") trains in its place."""
        if self.workers == 1:
            return module
        if parallel == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(module)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.workers,))
        for stack in module.modules():
            if isinstance(stack, nn.ModuleList):
                for layer in stack:
                    fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return the context of one backward pass: gradients are exchanged in the last one."""
        from torch.distributed.fsdp import FSDPModule
        from torch.nn.parallel import DistributedDataParallel

        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        return nullcontext()

    def share(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of a global batch, on the device."""
        return rows[self.rank :: self.workers].to(self.device, non_blocking=True)

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.workers > 1:
            dist.all_reduce(value)
        return value

    def highest(self, value: int) -> int:
        """Return the highest value of any rank."""
        if self.workers == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


@contextmanager
def join(context: Context) -> Iterator[Gang]:
    """Enter the gang of `context`; torch.distributed lives as long as the block."""
    device = torch.device(context.device)
    if context.workers == 1:
        yield Gang(0, 1, device)
        return
    if context.rendezvous is None:
        raise JobError(f"a gang of {context.workers} workers needs a rendezvous address")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=context.rendezvous,
        rank=context.rank,
        world_size=context.workers,
    )
    try:
        yield Gang(context.rank, context.workers, device)
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards, on the CPU; every rank must ask for it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; every rank has the same value."""
    target = target.detach()
    if isinstance(target, DTensor):
        target.copy_(sharded_like(target, value))
    else:
        target.copy_(value)


def sharded_like(target: Tensor, value: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, sharded as `target` is."""
    if not isinstance(target, DTensor):
        return value.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, device = target.device_mesh, target.device
    return distribute_tensor(value.to(device), mesh, target.placements, src_data_rank=None)
