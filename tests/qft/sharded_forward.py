"""One process of FSDP2: `python sharded_forward.py RANK PROCESSES STORE`; writes whether it computes what one does."""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from peft_quant.qft import Int8Weight


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 48), nn.GELU(), nn.Linear(48, 30))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(Int8Weight.from_dense(layer.weight, 0.02))
    return model


def main():
    rank, processes, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    whole, sharded = build(), build()
    mesh = DeviceMesh("cpu", range(processes))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    x = torch.randn(4, 70)
    outputs = [model(x) for model in (whole, sharded)]
    for output in outputs:
        output.square().sum().backward()
    shards = [parameter.to_local() for parameter in sharded.parameters()]
    gradients = [
        torch.allclose(ours.grad.full_tensor(), parameter.grad, atol=1e-6)
        for ours, parameter in zip(sharded.parameters(), whole.parameters())
    ]
    result = {
        "output": torch.equal(*outputs),
        "gradients": all(gradients),
        "int8": [list(shard.codes.shape) for shard in shards if isinstance(shard, Int8Weight)],
    }
    if rank == 0:
        json.dump(result, sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
