"""What every proof that training trains is made of."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


_SAMPLES = 1024


class TrainingError(RuntimeError):
    """Training that does not train what its method claims to train, or that trains something else."""


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of at most some thousand values, spread evenly over a tensor; of a sharded one, over the own shard."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()


def require_unchanged(frozen: dict[str, tuple[torch.Tensor, int]], way_out: str) -> None:
    """Check that no frozen tensor was written to.

    Args:
        frozen: tensors with the versions they had before the step, by name.
        way_out: what to do about it.

    Raises:
        TrainingError: one was.
    """
    changed = [name for name, (tensor, version) in frozen.items() if tensor._version != version]
    if changed:
        raise TrainingError(
            f"The optimizer changed {len(changed)} tensors that are frozen, first {changed[0]}. {way_out}"
        )
