"""The shape of a recipe's target, found without a network and without torch."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inheritune_ds.config.block_scores import read_scores
from inheritune_ds.config.corpus import TrainedTokenizer
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.model import Reference, Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.selection import parse
from inheritune_ds.errors import CorpusError, RecipeError, SurgeryError
from inheritune_ds.plan.activations import mlp_size

_UINT16_VALUES = 2**16


def target_shape(recipe: Recipe) -> tuple[Shape, int] | None:
    """Return the target's shape and number of blocks (also its `num_hidden_layers`); None if only the hub knows.

    A reference `recipe:NAME` has the shape of that recipe's target, a local folder that of its config.json, and a hub
    id needs `reference.shape`.

    Raises:
        SurgeryError: When the selection does not fit the reference, or its scores are missing.
        RecipeError: When the windows are longer than the model's positions, recipes refer to each other in a circle,
            or a file cannot be read.
        CorpusError: When the tokenizer has more entries than the model's vocabulary or the token type.
    """
    _check_token_type(recipe)
    shape = _target_shape(recipe, (recipe.name,))
    if shape is not None:
        _check_fit(recipe, shape)
    return (shape, shape.num_hidden_layers) if shape else None


def _target_shape(recipe: Recipe, chain: tuple[str, ...]) -> Shape | None:
    if recipe.reference is None:
        return recipe.target.shape
    shape = _reference_shape(recipe.reference, chain)
    if recipe.target.select is None:
        return None
    selection, scores = parse(recipe.target.select), read_scores(recipe.target.block_scores)
    try:
        selection.check_scores(scores)
        if shape is None:
            return None
        selected = len(selection.blocks(shape.num_hidden_layers, scores))
    except SurgeryError as error:
        raise SurgeryError(
            f"recipe {recipe.name}: {error.problem} ({recipe.reference.model})",
            allowed=error.allowed,
            action=error.action,
        ) from None
    shape = shape.model_copy(update={"num_hidden_layers": selected})
    return _half(recipe, shape) if recipe.target.width == "half" else shape


def _half(recipe: Recipe, shape: Shape) -> Shape:
    """Halve the number of heads and of MLP units; the head size stays the same."""
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": mlp_size(shape),
        "num_key_value_heads": shape.num_key_value_heads,
    }
    odd = [f"{name} {size}" for name, size in sizes.items() if size is not None and size % 2]
    if odd:
        raise SurgeryError(
            f"recipe {recipe.name}: target.width half of an odd number: {', '.join(odd)}",
            allowed="a reference with even sizes",
        )
    return shape.model_copy(update={name: size and size // 2 for name, size in sizes.items()})


def _reference_shape(reference: Reference, chain: tuple[str, ...]) -> Shape | None:
    if reference.recipe_name is not None:
        if reference.recipe_name in chain:
            raise RecipeError(
                f"recipes refer to each other in a circle: {' -> '.join((*chain, reference.recipe_name))}",
                action="give one of them a reference that is a model, or a target.shape",
            )
        return _target_shape(load_recipe(reference.recipe_name), (*chain, reference.recipe_name))
    config = Path(reference.model).expanduser() / "config.json"
    if config.is_file() or is_local_path(reference.model):
        return _read_config(config)
    return reference.shape


def _read_config(path: Path) -> Shape | None:
    """Read a local model's config.json; None for a family without `Shape`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror or "unreadable").lower() if isinstance(error, OSError) else "it is not JSON"
        raise RecipeError(
            f"reference.model: {path} cannot be read: {reason}",
            allowed="a folder with a Hugging Face config.json, recipe:NAME, or a hub id, which has one slash",
            action="check the path",
        ) from None
    try:
        return shape_from_config(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"reference.model: {path} does not describe a model: {_reason(error)}",
            allowed="a complete config.json as save_pretrained writes it",
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    return f"key {error} is missing" if isinstance(error, KeyError) else str(error)


def _check_fit(recipe: Recipe, shape: Shape) -> None:
    if recipe.training.seq_len > shape.max_position_embeddings:
        raise RecipeError(
            f"recipe {recipe.name}: training.seq_len {recipe.training.seq_len} is more than the model's "
            f"{shape.max_position_embeddings} positions",
            allowed=f"at most {shape.max_position_embeddings}",
            action=f"set training.seq_len={shape.max_position_embeddings}",
        )
    tokenizer = recipe.corpus.tokenizer
    if isinstance(tokenizer, TrainedTokenizer) and tokenizer.vocab_size > shape.vocab_size:
        raise CorpusError(
            f"recipe {recipe.name}: corpus.tokenizer.vocab_size {tokenizer.vocab_size} is more than the "
            f"{shape.vocab_size} entries of the model's vocabulary",
            allowed=f"at most {shape.vocab_size}",
            action="train a smaller tokenizer, or remove corpus.tokenizer to use the reference's",
        )


def _check_token_type(recipe: Recipe) -> None:
    tokenizer, number_type = recipe.corpus.tokenizer, recipe.corpus.token_dtype
    if number_type == "uint16" and isinstance(tokenizer, TrainedTokenizer) and tokenizer.vocab_size > _UINT16_VALUES:
        raise CorpusError(
            f"recipe {recipe.name}: corpus.token_dtype uint16 holds {_UINT16_VALUES} values, but "
            f"corpus.tokenizer.vocab_size is {tokenizer.vocab_size}",
            allowed="uint32 or auto",
            action="remove corpus.token_dtype",
        )


def shape_from_config(config: dict[str, Any]) -> Shape | None:
    """Read the Shape from a Hugging Face `config.json` with old or new keys; None for a model without Shape."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    own_head_size = bool(hidden and heads and config.get("head_dim") not in (None, hidden // heads))
    untied_gpt2 = config.get("model_type") == "gpt2" and config.get("tie_word_embeddings") is False
    extra = ("attention_bias", "mlp_bias", "add_cross_attention")
    if own_head_size or untied_gpt2 or any(config.get(key) for key in extra):
        return None
    if config.get("model_type") == "gpt2":
        return Shape(
            model_type="gpt2",
            vocab_size=config["vocab_size"],
            hidden_size=config["n_embd"],
            num_hidden_layers=config["n_layer"],
            num_attention_heads=config["n_head"],
            max_position_embeddings=config["n_positions"],
            intermediate_size=config.get("n_inner"),
            tie_word_embeddings=True,
            scale_attn_by_inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False),
        )
    if config.get("model_type") == "llama":
        rope = config.get("rope_parameters") or {}
        return Shape(
            model_type="llama",
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            max_position_embeddings=config["max_position_embeddings"],
            intermediate_size=config["intermediate_size"],
            num_key_value_heads=config.get("num_key_value_heads"),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        )
    return None
