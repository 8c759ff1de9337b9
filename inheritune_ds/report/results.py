"""Read what a run has left in its folder: the summary and the validations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from inheritune_ds.errors import RunFolderError

Model = TypeVar("Model", bound=BaseModel)


class Evaluation(BaseModel):
    """A loss on the fixed validation windows."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    loss: float
    """Mean over all counted targets, nats per token."""
    stderr: float
    """Its standard error."""
    windows: tuple[float, ...]
    """Mean loss of each window, always in the same order."""
    seq_len: int
    """Tokens a window."""
    tokens_sha256: str
    """Hash of the windows' tokens: losses with the same one are of the same text."""
    targets: tuple[int, ...] = ()
    """Counted in each window where documents are kept apart; empty if that is every token."""


class ReferenceEvaluation(Evaluation):
    """The reference's loss on the same windows."""

    model: str
    parameters: int


class RunSummary(BaseModel):
    """`run.json`: written once, when a run has finished."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    name: str
    recipe_fingerprint: str
    parameters: int
    blocks: int
    block_parameters: int
    steps: int
    tokens_seen: int
    unique_tokens: int | None
    """Different tokens among them; None with random sampling."""
    epochs: float
    train_seconds: float
    """Wall-clock seconds of training, all launches together."""
    world_size: int
    zero_stage: int
    precision: str
    master_weights: Literal["refilled", "fp32 model"]
    """How the optimizer's fp32 weights got the target's exact values (see training/engine.py)."""
    kind: Literal["inherited", "scratch"]
    export: str
    """Folder of the exported model, relative to the run folder."""


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    folder: Path
    summary: RunSummary
    initial: Evaluation | None
    """Validation before the first step."""
    final: Evaluation
    """Validation after the last step."""
    reference: ReferenceEvaluation | None


def run_result(run_dir: Path) -> RunResult:
    """Gather what a finished run has left in its folder.

    Raises:
        RunFolderError: When run.json or the last validation is missing or damaged.
    """
    summary = _read(run_dir / "run.json", RunSummary)
    first, last = (run_dir / "eval" / f"validation-step-{step:08d}.json" for step in (0, summary.steps))
    reference = run_dir / "eval" / "reference.json"
    return RunResult(
        folder=run_dir,
        summary=summary,
        initial=_read(first, Evaluation) if first.exists() else None,
        final=_read(last, Evaluation),
        reference=_read(reference, ReferenceEvaluation) if reference.exists() else None,
    )


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read: {(error.strerror or 'unreadable').lower()}",
            allowed="the folder of a finished run",
            action="give the run's own command again; it goes on where it stopped",
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunFolderError(
            f"{path} is damaged: {f'{where}: ' if where else ''}{first['msg']}",
            action="bring an intact copy back; without one, delete the run folder and give the run's own command again",
        ) from None
