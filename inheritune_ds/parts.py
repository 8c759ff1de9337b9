"""The parts of a model that a target can inherit, and the presets that name sets of them."""

from collections.abc import Sequence

from inheritune_ds.errors import RecipeError

BLOCK_PARTS = ("attention", "attention_norms", "mlp", "mlp_norms")
"""Inside every block. A norm belongs to the sub-module whose input or output it normalises."""
OUTER_PARTS = ("token_embeddings", "position_embeddings", "final_norm", "head")
PARTS = (*BLOCK_PARTS, *OUTER_PARTS)
"""Every tensor of a target is of exactly one part; a tied head is one tensor, of token_embeddings and head."""
GROUPS = {"norms": ("attention_norms", "mlp_norms")}
"""Short for several parts."""
PRESETS: dict[str, tuple[str, ...]] = {
    "all": PARTS,
    "paper-scripts": (*BLOCK_PARTS, "head"),
    "attention-only": ("attention", "attention_norms", "head"),
    "mlp-only": ("mlp", "mlp_norms", "head"),
    "attention-mlp": ("attention", "mlp", "head"),
    "none": (),
}
"""`paper-scripts` is what the authors' scripts copy (lit-gpt/Training/train.py and GPT2-experiments/
train_iniheritune.py of LLM-Inheritune, commit 560611d): the blocks and the head. In GPT-2, whose head is tied, that
brings the token embeddings; position embeddings and final norm stay fresh, in LLaMA the token embeddings too. The
three ablations are those of the paper (v4, table 3: attention with its norms, MLP with its norms, both without
norms); it says nothing of what surrounds the blocks there, so these copy the head as the scripts do."""


def inherited_parts(inherit: str | Sequence[str]) -> frozenset[str]:
    """The parts that a preset or a list of parts stands for.

    Raises:
        RecipeError: For an unknown name, or an empty list.
    """
    if isinstance(inherit, str):
        if inherit not in PRESETS:
            raise RecipeError(f"inherit: {inherit!r} is no preset", allowed=_allowed())
        return frozenset(PRESETS[inherit])
    unknown = [name for name in inherit if name not in (*PARTS, *GROUPS)]
    if unknown or not inherit:
        what = f"{', '.join(map(repr, unknown))}: neither preset nor part" if unknown else "the list of parts is empty"
        raise RecipeError(f"inherit: {what}", allowed=_allowed())
    return frozenset(part for name in inherit for part in GROUPS.get(name, (name,)))


def _allowed() -> str:
    return f"{', '.join(PRESETS)}, or a list of {', '.join([*PARTS, *GROUPS])}"
