"""Reading DeepSpeed's files of a checkpoint: pickles, of which only a few harmless classes are let in.

Where nothing else is needed, a pickle can be read without the power to run code: torch's restricted reader builds
tensors, numbers, text and containers, and refuses every other class that is not named here.
"""

import copyreg
import pickle
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from inheritune_ds.errors import CheckpointError

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def read_shard(path: Path) -> Any:
    """Read one file of a checkpoint; tensors stay on the disk until they are used.

    Args:
        path: A file in torch's zip format.

    Raises:
        CheckpointError: If it holds a class that no checkpoint of this program has, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_known_classes()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"refers to {found.group(1)}" if found else "is not written as DeepSpeed writes it"
        raise CheckpointError(
            f"{path} {what}: it was not read",
            allowed="tensors, numbers, text, and the classes that DeepSpeed saves of itself",
            action="delete this checkpoint unless you know who made it; the same command takes the one before it",
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0]}",
            action="delete this checkpoint; the same command takes the one before it",
        ) from None


def _known_classes() -> list[Any]:
    """What DeepSpeed 0.19 pickles beside plain values; none of them does anything when it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def pickle_stage_by_value() -> None:
    """Have DeepSpeed's ZeRO stage, the one enum that it saves, written as its class and its number.

    Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) would write a call of `getattr`, which no safe reader lets in.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


@dataclass(frozen=True)
class SavedFiles:
    """DeepSpeed's files below one folder.

    Attributes:
        folder: Where they lie.

    Raises:
        CheckpointError: Once a property is read: if files are missing, or hold what they should not.
    """

    folder: Path

    @cached_property
    def model(self) -> dict[str, Any]:
        """Counters, parameter shapes and the config it was saved under."""
        found = sorted(self.folder.glob("*mp_rank_00_model_states.pt"))
        if not found:
            raise self._incomplete("the model's file")
        model: dict[str, Any] = read_shard(found[0])
        return model

    @cached_property
    def optimizer(self) -> list[dict[str, Any]]:
        """The ZeRO optimizer's state of every rank, in the order of the ranks."""
        paths = {
            int(match.group(1)): path
            for path in self.folder.iterdir()
            if (match := _RANK.search(path.name)) is not None
        }
        ranks = int(self.model["dp_world_size"])
        missing = [str(rank) for rank in range(ranks) if rank not in paths]
        if missing:
            raise self._incomplete(f"the optimizer's file of rank {', '.join(missing)}")
        return [read_shard(paths[rank])["optimizer_state_dict"] for rank in range(ranks)]

    def _incomplete(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} lacks {what}",
            allowed="a checkpoint that this program has published",
            action="delete this checkpoint; the same command takes the one before it",
        )
