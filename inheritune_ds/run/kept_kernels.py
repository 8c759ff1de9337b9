"""The kernels of a run that has begun: later launches keep to them, on whatever machine they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from inheritune_ds.checkpoints.manifest import newest_step
from inheritune_ds.config.kernels import OFFLOADED_OPTIMIZER, KernelRequest
from inheritune_ds.errors import RecipeError, RunFolderError
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.training.kernels import Kernels

RECORD = "kernels.json"


def kept_request(run_dir: Path, request: KernelRequest, say: Callable[[str], None]) -> KernelRequest:
    """What a launch asks for: `auto` is what the first one took, once there are checkpoints.

    A named kernel replaces it, for whoever wants that; but the optimizer's state is the optimizer's own.

    Args:
        run_dir: The run folder.
        request: The `kernels` block of this launch.
        say: Told every kernel that is replaced, on rank 0.

    Raises:
        RunFolderError: If another optimizer is named than the one whose state the checkpoints hold.
    """
    taken: dict[str, Any] | None = read_json(run_dir / RECORD)
    if taken is None or newest_step(run_dir / "checkpoints") == 0:
        return request
    wanted = request.model_dump()
    optimizer = wanted["optimizer"]
    if optimizer not in ("auto", taken["optimizer"]):
        raise RunFolderError(
            f"{run_dir}: kernels.optimizer is {optimizer}, and the checkpoints hold the state of {taken['optimizer']}",
            allowed=f'"auto" or {taken["optimizer"]}',
            action=f'write "optimizer": "{taken["optimizer"]}" under kernels, or give the run another name',
        )
    kept = {key: taken.get(key, value) if value == "auto" else value for key, value in wanted.items()}
    for key, value in kept.items():
        if key in taken and value != taken[key]:
            say(
                f"WARNING: kernels.{key} is {value}, and was {taken[key]} before: later steps round otherwise than an "
                "uninterrupted run"
            )
    if kept["optimizer"] == OFFLOADED_OPTIMIZER:  # it cannot be named: offload_optimizer asks for it
        kept["optimizer"] = "auto"
    return KernelRequest(**kept)


def keep(run_dir: Path, kernels: Kernels) -> None:
    """Write down what a launch takes."""
    write_json(run_dir / RECORD, kernels.as_dict())


def refuse_replaced_loss(request: KernelRequest, kernels: Kernels, reason: str) -> None:
    """Refuse a named loss that the model cannot have.

    Raises:
        RecipeError: With the reason.
    """
    if request.loss not in ("auto", kernels.loss):
        raise RecipeError(
            f"kernels.loss: {request.loss} is named, but it cannot be used: {reason}",
            allowed='"auto" or "plain"',
            action='write "auto" for kernels.loss',
        )
