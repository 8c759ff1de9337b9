"""Read the summary and the validations of a finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

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
    """Mean loss of each window, in a fixed order."""
    seq_len: int
    """Tokens per window."""
    tokens_sha256: str
    """Hash of the windows' tokens."""
    targets: tuple[int, ...] = ()
    """Counted targets of each window, if documents are kept apart; empty if every token counts."""

    def document(self) -> dict[str, Any]:
        """Its entry in report.json, without the losses of single windows."""
        return {**self.model_dump(exclude={"windows", "targets"}), "windows": len(self.windows)}

    def __str__(self) -> str:
        return f"{self.loss:.4f} ± {self.stderr:.4f}"


class ReferenceEvaluation(Evaluation):
    """The reference's loss on the same windows."""

    model: str
    parameters: int
    precision: str = "fp32"
    """Of the forward pass: that of the run; earlier versions computed in fp32 always."""


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
        where = ".".join(str(part) for part in first["loc"])
        raise RunFolderError(
            f"{path} is damaged: {f'{where}: ' if where else ''}{first['msg']}",
            action="restore an intact copy; without one, delete the run folder and rerun the run's own command",
        ) from None
