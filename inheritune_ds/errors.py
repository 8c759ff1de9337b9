"""Every error a user may meet, with its exit code.

    InherituneError             1   (never raised itself)
    |- RecipeError              3   the recipe, an override or the DeepSpeed config is wrong
    |- CheckpointError          4   checkpoints exist, none can be used
    |- StorageError             5   a folder cannot be written, a disk is full
    |- CorpusError              6   a corpus file is missing, empty or does not fit
    |- HubError                 7   the Hugging Face hub cannot be reached or refuses
    |- RunFolderError           8   the run folder belongs to another recipe or another process
    |- SurgeryError             9   the selection does not fit the reference
    |- MachineError            10   a compiler, device or package is missing, or does not work
    |- TrainingError           11   the run itself went wrong (non-finite loss)
    |- ExportError             12   the exported model is not the trained one
    |- HangError               13   a phase of training took longer than its limit

0 is success *or* an agreed early stop; `status.json` in the run folder tells which. 2 is a
mistyped command line (argparse). 130 is a Ctrl-C, SIGTERM or SIGUSR1 while a run is prepared,
when nothing has to be saved, or a second Ctrl-C within 5 s. A traceback (exit code 1) is a
defect of this program.
"""

from collections.abc import Sequence


class InherituneError(Exception):
    """A mistake or condition that the user can act on: one message, one exit code, no traceback.

    Args:
        problem: What is wrong, where, and the value found.
        allowed: What would have been accepted, if that can be said.
        action: What to do next.
    """

    exit_code = 1

    def __init__(self, problem: str, *, allowed: str = "", action: str = "") -> None:
        self.problem = problem
        self.allowed = allowed
        self.action = action
        lines = [problem]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if action:
            lines.append(f"  do: {action}")
        super().__init__("\n".join(lines))


class RecipeError(InherituneError):
    """The recipe, an override on the command line or the DeepSpeed config cannot be used."""

    exit_code = 3

    @classmethod
    def of(cls, problems: Sequence[InherituneError]) -> "RecipeError":
        """Join all problems found into one error, each on lines of its own."""
        if len(problems) == 1 and isinstance(problems[0], cls):
            return problems[0]
        text = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        return cls(f"{count} found\n{text}")


class CheckpointError(InherituneError):
    """Checkpoints exist but none of them can be used to go on."""

    exit_code = 4


class StorageError(InherituneError):
    """A folder cannot be written or a disk is full."""

    exit_code = 5


class CorpusError(InherituneError):
    """A corpus file is missing, empty, unreadable, or its tokens do not fit the model."""

    exit_code = 6


class HubError(InherituneError):
    """The Hugging Face hub cannot be reached, or it does not give what was asked for."""

    exit_code = 7


class RunFolderError(InherituneError):
    """The run folder belongs to another recipe, or another process is writing to it."""

    exit_code = 8


class SurgeryError(InherituneError):
    """The selection of blocks does not fit the reference model."""

    exit_code = 9


class MachineError(InherituneError):
    """A compiler, a device, a launcher's variable or a package that the run needs is missing or does not work."""

    exit_code = 10


class TrainingError(InherituneError):
    """The training run went wrong, e.g. its loss is not a finite number any more."""

    exit_code = 11


class ExportError(InherituneError):
    """The exported model is not, bit for bit, the trained one."""

    exit_code = 12


class HangError(InherituneError):
    """A phase of training took longer than its limit, so the watchdog ended every rank."""

    exit_code = 13
