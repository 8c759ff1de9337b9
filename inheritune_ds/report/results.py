"""Read the summary and the validations of a finished run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from inheritune_ds.data.window_losses import Pieces
from inheritune_ds.errors import RunFolderError

Model = TypeVar("Model", bound=BaseModel)


class Evaluation(BaseModel):
    """A loss on the validation windows."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: Literal[2]
    loss: float
    """Mean over all counted targets, nats per token."""
    stderr: float | None
    """Its standard error over documents; None below two effective ones."""
    windows: int
    seq_len: int
    """Tokens per window."""
    tokens_sha256: str
    """Hash of the windows' tokens."""
    pieces: Pieces

    def document(self) -> dict[str, Any]:
        """Its entry in report.json, without the pieces."""
        found = asdict(self.pieces.estimate())
        del found["mean"]
        return {**self.model_dump(exclude={"format", "pieces"}), **found}


class ReferenceEvaluation(Evaluation):
    """The reference's loss on the same windows."""

    model: str
    parameters: int
    precision: str
    """Of the forward pass: that of the run."""


class RunSummary(BaseModel):
    """`run.json`, written when a run has finished."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    name: str
    recipe_fingerprint: str
    parameters: int
    blocks: int
    block_parameters: int
    steps: int
    tokens_seen: int
    unique_tokens: int | None
    """None with random sampling."""
    epochs: float
    train_seconds: float
    """Wall-clock seconds of training, all launches together."""
    world_size: int
    zero_stage: int
    precision: str
    master_weights: Literal["refilled", "fp32 model"]
    """Source of the optimizer's exact fp32 weights (see training/engine.py)."""
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

    @property
    def export(self) -> Path:
        """Folder of the exported model."""
        return self.folder / self.summary.export

    def document(self) -> dict[str, Any]:
        """Its entries in report.json."""
        return {
            "run": self.summary.model_dump(),
            "initial": self.initial.document() if self.initial else None,
            "final": self.final.document(),
        }


def run_result(run_dir: Path) -> RunResult:
    """Read the results of a finished run; raise a RunFolderError if one of its files is missing or damaged."""
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
            action="rerun the run's own command to resume it",
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"] == ("format",):
            raise RunFolderError(
                f"{path} was written by an earlier version, which kept no losses of documents",
                allowed="a run of this version",
                action="train it again under another name: name=OTHER",
            ) from None
        where = ".".join(str(part) for part in first["loc"])
        raise RunFolderError(
            f"{path} is damaged: {f'{where}: ' if where else ''}{first['msg']}",
            action="restore an intact copy; without one, delete the run folder and rerun the run's own command",
        ) from None
