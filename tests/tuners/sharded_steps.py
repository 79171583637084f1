"""One process of FSDP2: `python sharded_steps.py RANK PROCESSES STORE`; fails unless both skip the same step."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from gptq_models import PlainMLP

from peft_quant import PEQAConfig


def main():
    rank, processes, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    model = get_peft_model(PlainMLP(group_size=32), PEQAConfig())
    fully_shard(model, mesh=DeviceMesh("cpu", range(processes)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(spoilt=False):
        optimizer.zero_grad()
        model(torch.ones(3, 64)).pow(2).sum().backward()
        if spoilt:
            model.base_model.model.up.peqa_scales["default"].grad.to_local().view(-1)[0] = float("nan")
        optimizer.step()

    step()
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters() if p.requires_grad}
    step(spoilt=rank == 1)
    assert model.skipped_steps == 1
    assert all(torch.equal(model.get_parameter(name).full_tensor(), value) for name, value in before.items())
    step()
    assert not any(torch.equal(model.get_parameter(name).full_tensor(), value) for name, value in before.items())
    optimizer.param_groups[0]["lr"] = 1e9
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    assert any("the learning rate is too high" in str(warning.message) for warning in caught)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
