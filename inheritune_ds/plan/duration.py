"""Steps of a run and windows of an epoch."""

from inheritune_ds.config.training import Training
from inheritune_ds.errors import RecipeError


def windows_in(num_tokens: int, seq_len: int) -> int:
    """Count the windows of a source with `num_tokens` tokens.

    With T = seq_len, window w is `tokens[w * T : w * T + T + 1]`: the last token of a window is the first of the next,
    so every token but the first is a target exactly once.
    """
    return max(0, num_tokens - 1) // seq_len


def steps_in(training: Training, epoch_windows: int | None) -> int | None:
    """Optimizer steps that fit the duration of a recipe; None for epochs of unknown length.

    Raises:
        RecipeError: When the duration is shorter than one step.
    """
    count, unit = training.duration.amount, training.duration.unit
    if unit == "steps":
        return count
    if unit == "epochs":
        if epoch_windows is None:
            return None
        count *= epoch_windows * training.seq_len
    steps = count // training.global_batch_tokens
    if steps == 0:
        raise RecipeError(
            f"training.duration '{training.duration}' is {count} tokens, less than one step of "
            f"{training.global_batch_tokens} tokens",
            allowed=f"at least {training.global_batch_tokens} tokens",
            action="make training.duration longer or training.global_batch_tokens smaller",
        )
    return steps
