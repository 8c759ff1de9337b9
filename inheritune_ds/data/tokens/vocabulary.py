"""Compares the ids that a text can get from a tokenizer with the rows of the model's embeddings."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens.tokenizer import backend_of
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SHOWN = 3


def check_rows(tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
    """Refuse a tokenizer that gives a text ids without a row; warn of other ids without one, such as of padding.

    Raises:
        CorpusError: With the first of these tokens.
    """
    without = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not without:
        return
    backend = backend_of(tokenizer)
    spec = json.loads(backend.to_str())
    _refuse(_text_tokens(spec, [tokenizer.eos_token_id, *backend.encode("").ids]), rows)
    logger.warning(
        "%s: no row in the embeddings, which have %d; no text has these tokens, so training is not affected, but no "
        "input of the model may be padded with them",
        _listed(without),
        rows,
    )


def check_known_rows(recipe: Recipe) -> None:
    """Refuse the tokenizer of a recipe as `check_rows` does, as far as the files of local folders show it.

    Raises:
        CorpusError: With the first tokens that have no row.
    """
    rows, reference = _known_rows(recipe), recipe.reference
    name = recipe.corpus.tokenizer or (reference.model if reference is not None else None)
    if rows is None or not isinstance(name, str):
        return
    folder = Path(name).expanduser()
    spec, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    if isinstance(spec, dict):
        eos = settings.get("eos_token") if isinstance(settings, dict) else None
        content = eos.get("content") if isinstance(eos, dict) else eos
        ends = [token["id"] for token in spec.get("added_tokens", ()) if token["content"] == content]
        _refuse(_text_tokens(spec, ends), rows)


def _known_rows(recipe: Recipe) -> int | None:
    """The entries of the target's vocabulary, as far as recipes and local files show them."""
    shape, reference = recipe.target.shape, recipe.reference
    if reference is None:
        return shape.vocab_size if shape is not None else None
    if reference.recipe_name is not None:
        return _known_rows(load_recipe(reference.recipe_name))
    config = read_json(Path(reference.model).expanduser() / "config.json")
    if not isinstance(config, dict):
        return reference.shape.vocab_size if reference.shape is not None else None
    inner = config.get("text_config")
    rows = (inner if isinstance(inner, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _text_tokens(spec: Mapping[str, Any], needed: Iterable[int | None]) -> dict[str, int]:
    """The tokens of a serialized tokenizer that a text can get; the text of a special token counts as ordinary text.

    `needed` are the ids at the ends of every text.
    """
    vocabulary = spec["model"]["vocab"]
    found = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: n for n, entry in enumerate(vocabulary)}
    ends = set(needed)
    added = spec.get("added_tokens", ())
    return found | {token["content"]: token["id"] for token in added if not token["special"] or token["id"] in ends}


def _refuse(tokens: Mapping[str, int], rows: int) -> None:
    without = {token: number for token, number in tokens.items() if number >= rows}
    if without:
        raise CorpusError(
            f"the tokenizer gives ids without a row in the model's embeddings, which have {rows}: {_listed(without)}",
            allowed=f"tokens with ids below {rows}, except special tokens that are in no text",
            action="remove these tokens from the tokenizer's files, or set corpus.tokenizer (from scratch also "
            "target.shape.vocab_size) so that tokenizer and model fit",
        )


def _listed(tokens: Mapping[str, int]) -> str:
    """Up to three tokens with their ids, the largest last."""
    ordered = sorted(tokens.items(), key=lambda item: item[1])
    shown = [f"{token} (id {number})" for token, number in ordered[-_SHOWN:]]
    return ", ".join(shown) + (f" and {len(ordered) - _SHOWN} others" if len(ordered) > _SHOWN else "")
