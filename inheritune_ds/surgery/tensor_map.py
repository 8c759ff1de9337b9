"""Map every tensor of the target to a tensor of a source, before any byte is written.

Names and formats are those of the files. A kept block's tensors get their new block number; all other names stay.
transformers therefore renames and fuses the target's tensors on loading exactly as it does the reference's.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inheritune_ds.config.inheritance import GROUPS, PARTS, needed_parts
from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.blocks import part_of
from inheritune_ds.surgery.meta_model import MetaModel, contradiction
from inheritune_ds.surgery.weight_files import DTYPES, WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class TensorCopy:
    """One tensor of the target's files."""

    name: str
    """In the target's files."""
    module_name: str
    """In the target's model."""
    block: int | None
    """In the target; None outside the blocks."""
    part: str
    """One of `config.inheritance.PARTS`; empty if none."""
    source: "SourceModel | None" = None
    """None for a fresh tensor."""
    source_name: str = ""
    """In the source's files."""
    source_block: int | None = None


class SourceModel:
    """The `reference` or `previous` model (its role), checked to be complete and to match its config.

    Raises:
        RecipeError: If it has no weights.
        SurgeryError: If weights are missing or damaged or contradict the config, or the model cannot be cut.
    """

    def __init__(self, role: str, folder: Path, config: "PreTrainedConfig") -> None:
        self.role, self.folder, self.config = role, folder, config
        self.files = WeightFiles(folder, str(folder))
        self.dtype = _dtype(config, self.files)
        self._check_types()
        self.skeleton = MetaModel(config, self.dtype)
        named = self.skeleton.module_names(self.files)
        shapes = self.skeleton.shapes
        self.leftovers = sorted(name for name, module in named.items() if module not in shapes)
        blocks = self.skeleton.blocks
        stray = [name for name in self.leftovers if blocks.index_of(named[name]) is not None]
        stray = [name for name in stray if not self.skeleton.is_ignored(named[name])]
        if stray:
            raise contradiction([f"{name} belongs to no block of the config" for name in stray])
        self.module_of = {name: module for name, module in named.items() if module in shapes}
        self._check_numbers()
        self._renamed: dict[str, str] = {}
        self._check_whole()
        self._settle_ties()

    def _check_types(self) -> None:
        odd = {str(self.files.meta(name).dtype) for name in self.files} - {str(dtype) for dtype in DTYPES}
        if odd:
            raise SurgeryError(
                f"the {self.role}'s weights are quantized: {self.folder} holds tensors of {', '.join(sorted(odd))}",
                allowed=f"tensors of {', '.join(sorted(DTYPES.values()))}",
            )

    def _check_numbers(self) -> None:
        """Refuse integers as weights, and two full tensors for the same parameter."""
        known = self.skeleton.model.state_dict()
        metas = {name: self.files.meta(name) for name in self.module_of}
        whole: dict[str, str] = {}
        problems = []
        for name, module in self.module_of.items():
            if known[module].is_floating_point() and not metas[name].is_floating_point():
                kind = str(metas[name].dtype).removeprefix("torch.")
                problems.append(f"{name} holds numbers of type {kind}, the model's are floating point")
            if metas[name].shape == known[module].shape:
                if module in whole:
                    problems.append(f"{whole[module]} and {name} are both {module} of the model")
                whole[module] = name
        if problems:
            raise contradiction(problems)

    def _check_whole(self) -> None:
        skeleton = self.skeleton
        given = set(self.module_of.values())
        missing = sorted(
            name
            for name in skeleton.required - given
            if not any(tied in given for tied, source in skeleton.tied.items() if source == name)
        )
        if missing:
            raise contradiction([f"{name} is not in the files" for name in missing])
        skeleton.load({name: self.files.meta(name) for name in self.module_of})

    def _settle_ties(self) -> None:
        """Skip second copies of tied tensors, which pickle files hold; check that they are equal.

        A file may hold only the copy (`safetensors.torch.save_model`): it is then used under the first one's name.
        """
        for name, module in list(self.module_of.items()):
            twin = self.skeleton.tied.get(module)
            if twin is None:
                continue
            first = next((file for file, its in self.module_of.items() if its == twin), None)
            if first is None:
                self.module_of[name] = self._renamed[name] = twin
                continue
            if not torch.equal(self.files.tensor(name), self.files.tensor(first)):
                raise contradiction([f"{name} differs from {first}, but the config ties them"])
            del self.module_of[name]
            self.leftovers.append(name)

    def loaded_as(self, name: str) -> str:
        """Name under which a tensor of the files is loaded and written."""
        return self._renamed.get(name, name)

    @cached_property
    def by_block(self) -> dict[int | None, list[str]]:
        """Names of the files' tensors by block; None for those outside the blocks."""
        found: dict[int | None, list[str]] = {}
        for name, module in self.module_of.items():
            found.setdefault(self.skeleton.blocks.index_of(module), []).append(name)
        return found

    @cached_property
    def _number_at(self) -> dict[str, int]:
        """Position of the block's number among the dotted components of each block tensor's name."""
        blocks, found, known = self.skeleton.blocks, {}, set()
        for block, name in ((block, name) for block, names in self.by_block.items() for name in names):
            if block is None:
                continue
            words = name.split(".")
            for at in (at for at, word in enumerate(words) if word == str(block)):
                prefix = ".".join(words[:at])
                if prefix not in known:
                    other = (block + 1) % blocks.depth
                    moved = ".".join([*words[:at], str(other), *words[at + 1 :]])
                    if blocks.index_of(self.skeleton.module_names([moved])[moved]) != other:
                        continue
                    known.add(prefix)
                found[name] = at
                break
        return found

    def moved(self, name: str, place: int) -> str:
        """Name of a block's tensor with another block number."""
        words = name.split(".")
        if name not in self._number_at:
            raise SurgeryError(
                f"a {self.config.model_type} model cannot be cut: the name {name} has no block number",
                allowed="a model whose files name a block's tensors by the block's number",
            )
        words[self._number_at[name]] = str(place)
        return ".".join(words)


def _dtype(config: "PreTrainedConfig", files: WeightFiles) -> torch.dtype:
    """The dtype in which transformers loads a model: the config's, else that of the first floating-point tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    found = (files.meta(name).dtype for name in sorted(files))
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


@dataclass(frozen=True)
class TensorMap:
    """All tensors of a target."""

    grafts: list[TensorCopy]
    """One for each tensor of its files."""
    steps: list[tuple[SourceModel, int]]
    """For each block of the target, its source and its number there."""
    outer: SourceModel | None
    """Source of everything outside the blocks; None if nothing is inherited."""

    @property
    def sources(self) -> list[SourceModel]:
        """Each source once."""
        found = [self.outer, *(source for source, _ in self.steps)]
        return list({source.role: source for source in found if source}.values())

    @property
    def leftovers(self) -> list[str]:
        """Tensors of the sources' files without a place in their models."""
        return sorted({name for source in self.sources for name in source.leftovers})


def plan_copies(
    target: MetaModel, steps: Sequence[tuple[SourceModel, int]], outer: SourceModel | None, parts: Collection[str]
) -> TensorMap:
    """List every tensor of the target with its source; `parts` are the inherited ones of `config.inheritance.PARTS`.

    Raises:
        SurgeryError: If the target has no tensor of a requested part, no place for a tensor of a source, or (unless
            everything is inherited) a tensor of no known part.
    """
    _check_parts(target, parts)
    origins: dict[str, _Origin] = {}
    if outer is not None:
        origins |= {outer.loaded_as(name): (outer, name, None) for name in outer.by_block.get(None, [])}
    for place, (source, block) in enumerate(steps):
        origins |= {source.moved(name, place): (source, name, place) for name in source.by_block.get(block, [])}
    grafts = _inherited(target, origins, parts)
    covered = {graft.module_name for graft in grafts}
    tied_too = {target.tied[module] for module in covered if module in target.tied}
    grafts += [
        TensorCopy(module, module, target.blocks.index_of(module), part_of(target.model, target.blocks, module))
        for module in target.shapes
        if module in target.required - covered - tied_too
    ]
    return TensorMap(grafts, list(steps), outer)


_Origin = tuple[SourceModel, str, int | None]
"""Source, name in the source's files, block in the target."""


def _inherited(target: MetaModel, origins: Mapping[str, _Origin], parts: Collection[str]) -> list[TensorCopy]:
    """Copies of those tensors of `origins` (by name in the target's files) that belong to one of the parts."""
    everything = set(parts) == set(PARTS)
    grafts: list[TensorCopy] = []
    for name, module in target.module_names(origins).items():
        source, source_name, place = origins[name]
        if module not in target.shapes:
            raise SurgeryError(
                f"the target, a {target.config.model_type} model of {target.blocks.depth} blocks, has no place for "
                f"{source_name} of the {source.role}",
                allowed="another selection, or width: full",
            )
        part = part_of(target.model, target.blocks, module)
        if not part and not everything:
            raise SurgeryError(
                f"{module} of a {target.config.model_type} model belongs to none of the parts that can be inherited "
                "separately",
                allowed="inherit: all",
            )
        if everything or _is_inherited(target, module, part, parts):
            source_block = source.skeleton.blocks.index_of(source.module_of[source_name])
            grafts.append(TensorCopy(name, module, place, part, source, source_name, source_block))
    return grafts


def _check_parts(target: MetaModel, parts: Collection[str]) -> None:
    """Refuse to inherit parts that the model does not have."""
    has = {part_of(target.model, target.blocks, name) for name in target.shapes}
    lacking = [choice for choice in needed_parts(parts) if not has & {*choice}]
    if lacking:
        names = {parts: name for name, parts in GROUPS.items()}
        raise SurgeryError(
            f"inherit: a {target.config.model_type} model of these blocks has no "
            f"{', '.join(names.get(choice, choice[0]) for choice in lacking)}",
            allowed=f"inherit: all, or parts that it has: {', '.join(part for part in PARTS if part in has)}",
        )


def _is_inherited(target: MetaModel, module: str, part: str, parts: Collection[str]) -> bool:
    """Whether a tensor's part is inherited; a tensor shared by embeddings and head comes with either."""
    tied = module in target.tied or module in target.tied.values()
    return part in parts or (
        tied and part in ("token_embeddings", "head") and bool({"token_embeddings", "head"} & {*parts})
    )
