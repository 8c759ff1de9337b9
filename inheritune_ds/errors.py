"""Errors for users, and their exit codes.

    InherituneError             1   (never raised itself)
    |- RecipeError              3   the recipe, an override or the DeepSpeed config is wrong
    |- CheckpointError          4   checkpoints exist, none can be used
    |- StorageError             5   a folder cannot be written, a disk is full
    |- CorpusError              6   a corpus file is missing, empty or does not fit
    |- HubError                 7   the Hugging Face hub cannot be reached or refuses
    |- RunFolderError           8   the run folder belongs to another recipe or another process
    |- SurgeryError             9   the selection does not fit the reference
    |- MachineError            10   a compiler, device or package is missing or does not work; out of memory
    |- TrainingError           11   the run itself went wrong (non-finite loss)
    |- ExportError             12   the exported model is not the trained one
    |- HangError               13   a phase of training took longer than its limit

0 is success *or* an agreed early stop; `status.json` in the run folder distinguishes them. 2 is an
invalid command line (argparse). 130 is a Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP before training, when nothing
has to be saved, or a second Ctrl-C within 5 s. A traceback (exit code 1) is a bug.
"""

from collections.abc import Sequence


class InherituneError(Exception):
    """A condition that the user can act on: one message, one exit code, no traceback.

    Args:
        problem: The fault, its place, and the value found.
        allowed: Accepted values, if known.
        action: The next step for the user.
    """

    exit_code = 1

    def __init__(self, problem: str, *, allowed: str = "", action: str = "") -> None:
        self.problem = problem
        self.allowed = allowed
        self.action = action
        hints = {"allowed": allowed, "do": action}
        super().__init__("\n".join([problem, *(f"  {label}: {text}" for label, text in hints.items() if text)]))


class RecipeError(InherituneError):
    """The recipe, an override on the command line or the DeepSpeed config cannot be used."""

    exit_code = 3

    @classmethod
    def of(cls, problems: Sequence[InherituneError]) -> "RecipeError":
        """Join several problems into one numbered error."""
        if len(problems) == 1 and isinstance(problems[0], cls):
            return problems[0]
        text = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        return cls(f"{count} found\n{text}")


class CheckpointError(InherituneError):
    """Checkpoints exist, but the run cannot resume from any of them."""

    exit_code = 4


class StorageError(InherituneError):
    """A folder cannot be written or a disk is full."""

    exit_code = 5


class CorpusError(InherituneError):
    """A corpus file is missing, empty, unreadable, or its tokens do not fit the model."""

    exit_code = 6


class HubError(InherituneError):
    """The Hugging Face hub cannot be reached, or it refuses a request."""

    exit_code = 7


class RunFolderError(InherituneError):
    """The run folder belongs to another recipe, or another process is writing to it."""

    exit_code = 8


class SurgeryError(InherituneError):
    """The selection of blocks does not fit the reference model."""

    exit_code = 9


class MachineError(InherituneError):
    """A required compiler, device, launcher variable or package is missing or does not work, or memory ran out."""

    exit_code = 10


class TrainingError(InherituneError):
    """The training run went wrong, for example with a non-finite loss."""

    exit_code = 11


class ExportError(InherituneError):
    """The exported model is not bitwise identical to the trained one."""

    exit_code = 12


class HangError(InherituneError):
    """A phase of training took longer than its limit, so the watchdog ended every rank."""

    exit_code = 13
