"""Token files of zeros."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from inheritune_ds.data.tokens.token_set import TokenSet


def token_set(folder: Path, train: Mapping[str, int], held_out: Mapping[str, int]) -> TokenSet:
    """Sources by name with so many tokens to train on, and so many held out; no file of 0 tokens."""

    def entry(source: str, split: str, tokens: int) -> list[dict[str, object]]:
        (folder / source).mkdir(exist_ok=True)
        np.zeros(tokens, "<u2").tofile(folder / source / f"{split}-00000.bin")
        return [{"file": f"{split}-00000.bin", "tokens": tokens}] if tokens else []

    sources = [
        {
            "name": name,
            "train": entry(name, "train", train[name]),
            "validation": entry(name, "validation", held_out.get(name, 0)),
        }
        for name in train
    ]
    return TokenSet(folder, {"token_dtype": "uint16", "eos_id": 1, "sources": sources})
