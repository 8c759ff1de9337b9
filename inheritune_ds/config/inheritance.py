"""The parts of a model that a target can inherit, and the presets that name sets of them."""

from collections.abc import Collection, Sequence

from inheritune_ds.errors import RecipeError

BLOCK_PARTS = ("attention", "attention_norms", "mlp", "mlp_norms")
"""Inside every block. A norm belongs to the sub-module whose input or output it normalises."""
OUTER_PARTS = ("token_embeddings", "position_embeddings", "final_norm", "head")
PARTS = (*BLOCK_PARTS, *OUTER_PARTS)
"""Every tensor of a target is of exactly one part; a tied head is one tensor, of token_embeddings and head."""
GROUPS: dict[str, tuple[str, ...]] = {"norms": ("attention_norms", "mlp_norms")}
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
_ABOUT = {"attention-only": ("attention",), "mlp-only": ("mlp",), "attention-mlp": ("attention", "mlp")}


def inherited_parts(inherit: str | Sequence[str]) -> frozenset[str]:
    """The parts that a preset or a list of parts stands for.

    Args:
        inherit: A preset; or parts and groups, as a list or with commas between them.

    Raises:
        RecipeError: For an unknown name, a preset among parts, an empty entry, or an empty list.
    """
    if isinstance(inherit, str) and inherit.strip() in PRESETS:
        return frozenset(PRESETS[inherit.strip()])
    names = [name.strip() for name in (inherit.split(",") if isinstance(inherit, str) else inherit)]
    unknown = [name for name in names if name not in (*PARTS, *GROUPS, *PRESETS, "")]
    presets = [name for name in names if name in PRESETS]
    problem = ""
    if unknown:
        problem = f"{', '.join(map(repr, unknown))}: neither preset nor part"
    elif not any(names):
        problem = "the list of parts is empty"
    elif "" in names:
        problem = f"{inherit!r} has an empty entry, number {names.index('') + 1} of {len(names)}"
    elif presets:
        problem = f"{presets[0]!r} is a preset; it stands alone, not in a list"
    if problem:
        raise RecipeError(f"inherit: {problem}", allowed=_allowed())
    return frozenset(part for name in names for part in GROUPS.get(name, (name,)))


def needed_parts(parts: Collection[str]) -> list[tuple[str, ...]]:
    """What a model must have for the inheritance to mean anything: of each tuple at least one part.

    A preset needs what it is about, and `all` nothing: it takes what there is. A list needs every part that it names,
    and of a group one.
    """
    preset = next((name for name, its in PRESETS.items() if set(its) == set(parts)), None)
    if preset is not None:
        return [(part,) for part in _ABOUT.get(preset, ())]
    groups = [group for group in GROUPS.values() if set(group) <= set(parts)]
    grouped = {part for group in groups for part in group}
    return groups + [(part,) for part in PARTS if part in parts and part not in grouped]


def _allowed() -> str:
    return f"{', '.join(PRESETS)}, or a list of {', '.join([*PARTS, *GROUPS])}"
