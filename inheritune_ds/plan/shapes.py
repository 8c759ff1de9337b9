"""The shape of the model that a recipe trains, found without a network and without torch."""

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
    """Shape of the target, and its number of blocks; None when only the hub can tell.

    The shape's own `num_hidden_layers` is the target's. A reference `recipe:NAME` is followed to that
    recipe's target, a local folder is read, and a hub id needs `reference.shape`.

    Raises:
        SurgeryError: When more blocks are selected than the reference has, or the scores that a selection goes by are
            not there.
        RecipeError: When the windows are longer than the model's positions, recipes refer in a circle, or the file of
            scores cannot be read.
        CorpusError: When the tokenizer has more entries than the model or than the token type holds.
    """
    _check_token_type(recipe)
    shape = _target_shape(recipe, (recipe.name,))
    if shape is None:
        return None
    _check_fit(recipe, shape)
    return shape, shape.num_hidden_layers


def reference_shape(recipe: Recipe) -> Shape | None:
    """Shape of the reference; None without a reference, or when only the hub can tell."""
    return _reference_shape(recipe.reference, (recipe.name,)) if recipe.reference else None


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
    """Half the heads and half the MLP's units; a head keeps its size."""
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
    """Read a local model's config.json; None for a family that `Shape` does not describe."""
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
            action="train a smaller tokenizer, or leave corpus.tokenizer out to use the reference's",
        )


def _check_token_type(recipe: Recipe) -> None:
    tokenizer, number_type = recipe.corpus.tokenizer, recipe.corpus.token_dtype
    if number_type == "uint16" and isinstance(tokenizer, TrainedTokenizer) and tokenizer.vocab_size > _UINT16_VALUES:
        raise CorpusError(
            f"recipe {recipe.name}: corpus.token_dtype uint16 holds {_UINT16_VALUES} values, but "
            f"corpus.tokenizer.vocab_size is {tokenizer.vocab_size}",
            allowed="uint32 or auto",
            action="leave corpus.token_dtype out",
        )


def shape_from_config(config: dict[str, Any]) -> Shape | None:
    """Read the Shape out of a Hugging Face `config.json`; None for a family not described by Shape.

    Args:
        config: The parsed JSON object; old and new spellings of the keys are both read.
    """
    model_type = config.get("model_type")
    if _has_unshaped_parts(config):
        return None
    if model_type == "gpt2":
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
    if model_type == "llama":
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


def _has_unshaped_parts(config: dict[str, Any]) -> bool:
    """Whether a config asks for parameters that Shape has no field for."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    own_head_size = bool(hidden and heads and config.get("head_dim") not in (None, hidden // heads))
    untied_gpt2 = config.get("model_type") == "gpt2" and config.get("tie_word_embeddings") is False
    extra = ("attention_bias", "mlp_bias", "add_cross_attention")
    return own_head_size or untied_gpt2 or any(config.get(key) for key in extra)
