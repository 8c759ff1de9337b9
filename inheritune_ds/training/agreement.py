"""What ranks agree on outside an optimizer step."""

import torch
import torch.distributed as dist

from inheritune_ds.training.run_state import Wishes


def agree(wishes: Wishes, device: torch.device) -> Wishes:
    """Make any rank's wish everybody's; all ranks must call it together.

    Args:
        wishes: Of this rank.
        device: Where the process group communicates.
    """
    asked = torch.tensor([wishes.stop, wishes.save, wishes.evaluate], dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    stop, save, evaluate = (asked > 0).tolist()
    return Wishes(stop, save, evaluate)
