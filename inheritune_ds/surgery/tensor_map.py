"""Which tensor of the target comes from which tensor of a source: the whole surgery as a list, before a byte is moved.

It works on the tensors as the files name and store them. A kept block's tensors get the number of their new place;
everything else keeps its name. The target's files are therefore read by transformers in the same way as the
reference's, whatever it renames or fuses when it loads them.
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
    """One tensor of the target's files.

    Attributes:
        name: In the target's files.
        module_name: In the target's model.
        block: Its block in the target; None outside the blocks.
        part: One of `parts.PARTS`; empty for what belongs to none.
        source: Where it comes from; None for a fresh tensor.
        source_name: In the source's files.
        source_block: Its block in the source.
    """

    name: str
    module_name: str
    block: int | None
    part: str
    source: "SourceModel | None" = None
    source_name: str = ""
    source_block: int | None = None


class SourceModel:
    """A model that tensors are taken from, checked to be whole: its config describes its weights.

    Args:
        role: How messages and the report call it: `reference` or `previous`.
        folder: Hugging Face model folder.
        config: Its config.

    Raises:
        RecipeError: If it has no weights.
        SurgeryError: If weights are missing or damaged or contradict the config, or it is no model that can be cut.
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
        self._check_leftovers({name: named[name] for name in self.leftovers})
        self.module_of = {name: module for name, module in named.items() if module in shapes}
        self._check_numbers()
        self._renamed: dict[str, str] = {}
        self._check_whole()
        self._settle_ties()

    def _check_types(self) -> None:
        odd = {str(self.files.meta(name).dtype) for name in self.files} - {str(dtype) for dtype in DTYPES}
        if odd:
            raise SurgeryError(
                f"the {self.role}'s weights are quantised: {self.folder} holds tensors of {', '.join(sorted(odd))}",
                allowed=f"tensors of {', '.join(sorted(DTYPES.values()))}",
            )

    def _check_leftovers(self, named: Mapping[str, str]) -> None:
        stray = [
            name
            for name, module in named.items()
            if self.skeleton.blocks.index_of(module) is not None and not self.skeleton.is_ignored(module)
        ]
        if stray:
            raise contradiction([f"{name} belongs to no block of the config" for name in stray])

    def _check_numbers(self) -> None:
        """Refuse whole numbers in place of weights, and two tensors that are each the whole of the same parameter."""
        known = self.skeleton.model.state_dict()
        metas = {name: self.files.meta(name) for name in self.module_of}
        whole: dict[str, str] = {}
        problems = []
        for name, module in self.module_of.items():
            if known[module].is_floating_point() and not metas[name].is_floating_point():
                kind = str(metas[name].dtype).removeprefix("torch.")
                problems.append(f"{name} holds numbers of type {kind}, the model's are of floating point")
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
        """Leave out second copies of tied tensors, which pickle files hold; they must be copies.

        A file may hold the copy alone, as `safetensors.torch.save_model` writes it: that is the tensor then.
        """
        for name, module in list(self.module_of.items()):
            twin = self.skeleton.tied.get(module)
            first = next((file for file, its in self.module_of.items() if its == twin), None)
            if twin is None:
                continue
            if first is None:
                self.module_of[name] = self._renamed[name] = twin
                continue
            if not torch.equal(self.files.tensor(name), self.files.tensor(first)):
                raise contradiction([f"{name} differs from {first}, but the config ties them"])
            del self.module_of[name]
            self.leftovers.append(name)

    def loaded_as(self, name: str) -> str:
        """The name under which a tensor of the files is loaded and written: its own, but for a tied copy alone."""
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
        """At which dotted component of its name a block's tensor carries the block's number."""
        blocks, found, known = self.skeleton.blocks, {}, set()
        for block, names in self.by_block.items():
            if block is None:
                continue
            for name in names:
                words = name.split(".")
                for at, word in enumerate(words):
                    if word != str(block):
                        continue
                    head = (".".join(words[:at]), at)
                    if head not in known:
                        other = (block + 1) % blocks.depth
                        moved = ".".join([*words[:at], str(other), *words[at + 1 :]])
                        if blocks.index_of(self.skeleton.module_names([moved])[moved]) != other:
                            continue
                        known.add(head)
                    found[name] = at
                    break
        return found

    def moved(self, name: str, place: int) -> str:
        """The name of a block's tensor when its block stands in another place."""
        words = name.split(".")
        if name not in self._number_at:
            raise SurgeryError(
                f"a {self.config.model_type} model cannot be cut: {name} does not say its block by a number",
                allowed="a model whose files name a block's tensors by the block's number",
            )
        words[self._number_at[name]] = str(place)
        return ".".join(words)


def _dtype(config: "PreTrainedConfig", files: WeightFiles) -> torch.dtype:
    """The type that transformers loads a model in: what the config says, else that of the first tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    found = (files.meta(name).dtype for name in sorted(files))
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


@dataclass(frozen=True)
class TensorMap:
    """All tensors of a target.

    Attributes:
        grafts: One for each tensor of its files; fresh ones have no source.
        steps: For every block of the target, its source and its number there.
        outer: The source of everything outside the blocks; None if nothing is inherited.
    """

    grafts: list[TensorCopy]
    steps: list[tuple[SourceModel, int]]
    outer: SourceModel | None

    @property
    def sources(self) -> list["SourceModel"]:
        """Every source once."""
        return list(
            {source.role: source for source in [self.outer, *(source for source, _ in self.steps)] if source}.values()
        )

    @property
    def left_out(self) -> list[str]:
        """Tensors of the sources' files that no model has a place for."""
        return sorted({name for source in self.sources for name in source.leftovers})


def plan_copies(
    target: MetaModel, steps: Sequence[tuple[SourceModel, int]], outer: SourceModel | None, parts: Collection[str]
) -> TensorMap:
    """List every tensor of the target with its source.

    Args:
        target: The target's skeleton.
        steps: Source and block number of each of the target's blocks.
        outer: Source of embeddings, final norm and head; None if nothing is inherited.
        parts: What is inherited (`parts.PARTS`).

    Raises:
        SurgeryError: If the target has no tensor of a part that is asked for, no place for a tensor of a source, or
            a tensor of no known part, unless everything is inherited.
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
"""Source of a tensor, its name in the source's files, and its block in the target."""


def _inherited(target: MetaModel, origins: Mapping[str, _Origin], parts: Collection[str]) -> list[TensorCopy]:
    """The tensors of `origins`, by their names in the target's files, that belong to one of the parts."""
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
                "by themselves",
                allowed="inherit: all",
            )
        if everything or _is_inherited(target, module, part, parts):
            source_block = source.skeleton.blocks.index_of(source.module_of[source_name])
            grafts.append(TensorCopy(name, module, place, part, source, source_name, source_block))
    return grafts


def _check_parts(target: MetaModel, parts: Collection[str]) -> None:
    """Refuse to inherit what the model does not have: the target would be another than the one asked for."""
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
    """A tensor that the head is tied to (or that is tied to the embeddings) comes with either of the two."""
    tied = module in target.tied or module in target.tied.values()
    return part in parts or (
        tied and part in ("token_embeddings", "head") and bool({"token_embeddings", "head"} & {*parts})
    )
