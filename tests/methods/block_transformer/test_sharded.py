"""FSDP2 gathers a module's weights around its `forward`: every weight must be used inside one."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kvlab.methods.block_transformer.model import BlockTransformer


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("token_decoder", ["prefix", "summation", "cross_attention"])
@pytest.mark.parametrize("embedder", ["lookup", "projection", "cls"])
def test_a_sharded_model_trains_like_a_whole_one(
    make: Callable[..., BlockTransformer],
    ids: Callable[..., Tensor],
    token_decoder: str,
    embedder: str,
) -> None:
    model = make(block_length=4, token_decoder=token_decoder, embedder=embedder)
    whole, mesh, text = deepcopy(model), init_device_mesh("cpu", (1,)), ids(2, 12)
    for stack in list(model.modules()):
        if isinstance(stack, torch.nn.ModuleList):
            for layer in stack:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = [m(text).nll.sum() for m in (model, whole)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(mine.grad, DTensor), name
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
