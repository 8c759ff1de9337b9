"""The parts of a model that a target can inherit, and the presets that name sets of them."""

from collections.abc import Collection, Sequence

from inheritune_ds.errors import RecipeError

BLOCK_PARTS = ("attention", "attention_norms", "mlp", "mlp_norms")
"""Inside every block. A norm belongs to the sub-module whose input or output it normalizes."""
PARTS = (*BLOCK_PARTS, "token_embeddings", "position_embeddings", "final_norm", "head")
"""Every tensor of a target belongs to exactly one part; a tied head is one tensor of token_embeddings and head."""
GROUPS: dict[str, tuple[str, ...]] = {"norms": ("attention_norms", "mlp_norms")}
"""Names for several parts."""
PRESETS: dict[str, tuple[str, ...]] = {
    "all": PARTS,
    "moments": PARTS,
    "paper-scripts": (*BLOCK_PARTS, "head"),
    "attention-only": ("attention", "attention_norms", "head"),
    "mlp-only": ("mlp", "mlp_norms", "head"),
    "attention-mlp": ("attention", "mlp", "head"),
    "none": (),
}
"""`moments`: all parts, and Adam's moments and number of updates from the reference's newest checkpoint.
`paper-scripts`: the authors' scripts (lit-gpt/Training/train.py and GPT2-experiments/train_iniheritune.py of
LLM-Inheritune, commit 560611d) copy the blocks and the head. The head of GPT-2 is tied and includes the token
embeddings; other parts outside the blocks stay random. The three ablations are the paper's (v4, table 3). It does not
mention the parts outside the blocks there; these presets copy the head as the scripts do."""
_ABOUT = {"attention-only": ("attention",), "mlp-only": ("mlp",), "attention-mlp": ("attention", "mlp")}


def inherited_parts(inherit: str | Sequence[str]) -> frozenset[str]:
    """Return the parts of a preset, or of a list (or comma-separated string) of parts and groups.

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
        problem = f"{presets[0]!r} is a preset and cannot be part of a list"
    if problem:
        allowed = f"{', '.join(PRESETS)}, or a list of {', '.join([*PARTS, *GROUPS])}"
        raise RecipeError(f"inherit: {problem}", allowed=allowed)
    return frozenset(part for name in names for part in GROUPS.get(name, (name,)))


def needed_parts(parts: Collection[str]) -> list[tuple[str, ...]]:
    """Return the parts that a model must have: at least one of each tuple.

    An ablation preset needs the parts in its name, other presets none. A list needs every named part, and one of a
    group.
    """
    preset = next((name for name, its in PRESETS.items() if set(its) == set(parts)), None)
    if preset is not None:
        return [(part,) for part in _ABOUT.get(preset, ())]
    groups = [group for group in GROUPS.values() if set(group) <= set(parts)]
    grouped = {part for group in groups for part in group}
    return groups + [(part,) for part in PARTS if part in parts and part not in grouped]
