"""A finished folder of token files and what its manifest says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inheritune_ds.files import read_json
from inheritune_ds.publish import has_files


@dataclass(frozen=True)
class TokenSet:
    """A finished folder of token files.

    Attributes:
        folder: `cache/tokens/<fingerprint>`.
        manifest: The parsed `manifest.json`.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the tokens."""
        return str(self.manifest["fingerprint"])

    @property
    def token_dtype(self) -> str:
        """`uint16` or `uint32`, little-endian."""
        return str(self.manifest["token_dtype"])

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, added tokens among them."""
        return int(self.manifest["vocab_size"])

    @property
    def eos_id(self) -> int:
        """Id of the token that ends every document."""
        return int(self.manifest["eos_id"])

    @property
    def train_tokens(self) -> int:
        """Tokens in `train.bin`."""
        return int(self.manifest["train_tokens"])

    @property
    def validation_tokens(self) -> int:
        """Tokens in `validation.bin`."""
        return int(self.manifest["validation_tokens"])

    @property
    def train_documents(self) -> int:
        """Documents in `train.bin`; the last may be cut by `max_tokens`."""
        return int(self.manifest["train_documents"])

    @property
    def validation_documents(self) -> int:
        """Documents in `validation.bin`."""
        return int(self.manifest["validation_documents"])

    @property
    def train_path(self) -> Path:
        """The tokens to train on."""
        return self.folder / "train.bin"

    @property
    def validation_path(self) -> Path:
        """The tokens held out."""
        return self.folder / "validation.bin"

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer as a Hugging Face folder."""
        return self.folder / "tokenizer"


def open_finished(folder: Path, fingerprint: str) -> TokenSet | None:
    """Open a folder if it is complete: its manifest fits and every file is there in its full size.

    Args:
        folder: `cache/tokens/<fingerprint>`.
        fingerprint: What the manifest must say.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != fingerprint:
        return None
    return TokenSet(folder, manifest) if has_files(folder, manifest["files"]) else None
