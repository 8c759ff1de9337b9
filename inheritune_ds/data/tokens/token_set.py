"""A finished folder of token files and its manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inheritune_ds.console import Meter
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.files import read_json, sha256_file
from inheritune_ds.storage.folders import damaged_files


@dataclass(frozen=True)
class Shard:
    """A token file of header-free little-endian integers."""

    path: Path
    tokens: int


@dataclass(frozen=True)
class TokenSource:
    """The shards of one source, in order."""

    name: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    @property
    def train_tokens(self) -> int:
        """Training tokens."""
        return sum(shard.tokens for shard in self.train)


@dataclass(frozen=True)
class TokenSet:
    """A finished folder `cache/tokens/<fingerprint>` of token files, and its parsed `manifest.json`."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all settings and data that decide the tokens."""
        return str(self.manifest["fingerprint"])

    @property
    def sources(self) -> tuple[TokenSource, ...]:
        """The sources in the order of the recipe."""
        return tuple(
            TokenSource(entry["name"], self._shards(entry, "train"), self._shards(entry, "validation"))
            for entry in self.manifest["sources"]
        )

    def _shards(self, entry: Mapping[str, Any], part: str) -> tuple[Shard, ...]:
        folder = self.folder / entry["name"]
        return tuple(Shard(folder / shard["file"], int(shard["tokens"])) for shard in entry[part])

    @property
    def token_dtype(self) -> str:
        """`uint16` or `uint32`, little-endian."""
        return str(self.manifest["token_dtype"])

    @property
    def vocab_size(self) -> int:
        """The tokenizer's largest id plus 1, including added tokens."""
        return int(self.manifest["vocab_size"])

    @property
    def eos_id(self) -> int:
        """Id of the token that ends every document and appears nowhere else."""
        return int(self.manifest["eos_id"])

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources."""
        return int(self.manifest["train_tokens"])

    @property
    def validation_tokens(self) -> int:
        """Held-out tokens of all sources."""
        return int(self.manifest["validation_tokens"])

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer as a Hugging Face folder."""
        return self.folder / "tokenizer"


def open_finished(folder: Path, fingerprint: str) -> TokenSet | None:
    """Open `cache/tokens/<fingerprint>` if its manifest has this fingerprint and every file has its full size."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != fingerprint:
        return None
    return None if damaged_files(folder, manifest["files"]) else TokenSet(folder, manifest)


def find_damage(tokens: TokenSet) -> str | None:
    """Describe the first file with a wrong hash; None if all are intact. Raises a CorpusError for an unreadable one."""
    files = tokens.manifest["files"]
    try:
        with Meter("checking token files", "bytes", sum(entry["bytes"] for entry in files.values())) as meter:
            for name, entry in files.items():
                found = sha256_file(tokens.folder / name, meter.advance)
                if found != entry["sha256"]:
                    return f"{name} has sha256 {found[:12]}... not {entry['sha256'][:12]}..."
    except OSError as error:
        raise CorpusError(
            f"{error.filename or tokens.folder}: it cannot be read ({(error.strerror or 'unreadable').lower()})",
            action=f"check the disk, or remove the folder {tokens.folder} and rerun the same command "
            "to remake the tokens",
        ) from None
    return None
