"""Steps of a run and tokens of an epoch."""

from inheritune_ds.config.training import Training
from inheritune_ds.errors import RecipeError


def tokens_an_epoch(unique_tokens: int, seq_len: int) -> int:
    """Tokens predicted in one pass over the whole windows (a window needs one token more than it predicts)."""
    return max(unique_tokens - 1, 0) // seq_len * seq_len


def steps_in(training: Training, epoch_tokens: int | None) -> int | None:
    """Optimizer steps of a recipe: the whole steps that fit its duration; None for epochs of unknown length.

    Args:
        training: Duration and batch.
        epoch_tokens: Tokens of all windows of the corpus; None when it is not known yet.

    Raises:
        RecipeError: When the duration is shorter than one step.
    """
    count, unit = training.duration_parts
    if unit == "steps":
        return count
    if unit == "epochs":
        if epoch_tokens is None:
            return None
        count *= epoch_tokens
    steps = count // training.global_batch_tokens
    if steps == 0:
        raise RecipeError(
            f"training.duration {training.duration!r} is {count} tokens, less than one step of "
            f"{training.global_batch_tokens} tokens",
            allowed=f"at least {training.global_batch_tokens} tokens",
            action="make training.duration longer or training.global_batch_tokens smaller",
        )
    return steps
