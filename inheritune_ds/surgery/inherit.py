"""Build the target: selected blocks of the reference with its embeddings, final norm and head.

The steps: find out what the sources hold, list every tensor of the target with its source (`grafts`), write the
files straight from the sources' (`writing`), read them back and compare (`report`), prove that the model computes
the same (`proof`), publish. Nothing is published unless all of it succeeds. With `inherit: none`, or a shape from
scratch, all tensors are fresh.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inheritune_ds.config.block_scores import read_scores
from inheritune_ds.config.inheritance import inherited_parts
from inheritune_ds.config.model import Reference, Target
from inheritune_ds.config.selection import parse
from inheritune_ds.errors import CorpusError, SurgeryError
from inheritune_ds.storage.files import read_json, storage_errors, write_json, write_text
from inheritune_ds.storage.folders import damaged_files, describe_files, staged
from inheritune_ds.surgery.compare import describe_tensors
from inheritune_ds.surgery.config_cut import DROPOUT_KEY, cut_config, num_blocks, set_dropout
from inheritune_ds.surgery.half_width import halve_config
from inheritune_ds.surgery.load import build_config, load_config
from inheritune_ds.surgery.meta_model import MetaModel, check_decoder, check_same_blocks
from inheritune_ds.surgery.metadata_files import copy_licence, copy_tokenizer, is_own_tokenizer, write_configs
from inheritune_ds.surgery.reference import ReferenceModel, locate
from inheritune_ds.surgery.report import target_card
from inheritune_ds.surgery.tensor_map import SourceModel, TensorMap, plan_copies
from inheritune_ds.surgery.tensor_values import TargetValues
from inheritune_ds.surgery.verify import count_parameters, prove
from inheritune_ds.surgery.write_shards import write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REPORT = "inheritance.json"
_FREE_KEYS = {"dtype", "_name_or_path", "transformers_version", "architectures", "use_cache"}
"""Config keys in which a trained target may differ from a cut of its reference; dropout may, too."""


@dataclass(frozen=True)
class TargetModel:
    """A target on disk.

    Attributes:
        folder: A Hugging Face folder.
        report: Its inheritance report.
    """

    folder: Path
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Previous:
    """The target of an earlier round, whose trained blocks are kept when the next one grows.

    Attributes:
        name: How the user called it.
        folder: Its Hugging Face folder.
        weights_sha256: sha256 by file name of its weight files.
    """

    name: str
    folder: Path
    weights_sha256: dict[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What the report records of it; the place of the folder does not count."""
        return {"name": self.name, "weights_sha256": self.weights_sha256}


def locate_previous(folder: Path) -> Previous:
    """Find the target of an earlier round.

    Raises:
        RecipeError: If the folder holds no model.
        SurgeryError: If a weight file is not the one that its own records describe.
    """
    found = locate(Reference(model=str(folder.resolve())), Path)
    return Previous(str(folder), found.folder, found.weights_sha256)


def find_target(folder: Path, identity: Mapping[str, Any], *, verify: bool = False) -> TargetModel | None:
    """The finished target in `folder`, if it was built for the same `identity` and is whole.

    Args:
        folder: Where it may be.
        identity: What it was built for.
        verify: Whether to hash its files; their sizes alone are compared otherwise.
    """
    manifest, report = read_json(folder / MANIFEST), read_json(folder / REPORT)
    if not isinstance(manifest, dict) or not isinstance(report, dict) or manifest.get("identity") != identity:
        return None
    damaged = damaged_files(folder, manifest.get("files"), hashes=verify)
    return None if damaged else TargetModel(folder, report)


def may_replace(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether `folder` holds nothing but files of a target of this `identity`, so that one that is damaged may go."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("identity") != identity:
        return False
    listed = manifest.get("files")
    own = {MANIFEST, *(listed if isinstance(listed, dict) else ())}
    return all(path.relative_to(folder).as_posix() in own for path in folder.rglob("*") if not path.is_dir())


@dataclass(frozen=True)
class Cut:
    """What a target is built from.

    Attributes:
        target: From the recipe.
        seed: Of the random values of fresh tensors.
        identity: Recorded, so that `find_target` knows whose the target is.
        command: That builds this target, for the model card.
        reference: Weights to inherit from; None with `inherit: none` or from scratch.
        reference_config: Config the target's is cut from; None from scratch.
        previous: Its blocks become the first ones; the selection's further blocks come from the reference.
        tokenizer: Travels along, and so do its special ids if the reference's are not its own. None: no tokenizer
            that could be read.
        tokenizer_source: Folder whose tokenizer files are copied as they are, over those of `tokenizer`.
    """

    target: Target
    seed: int
    identity: Mapping[str, Any]
    command: str
    reference: ReferenceModel | None
    reference_config: "PreTrainedConfig | None"
    previous: Previous | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    tokenizer_source: Path | None = None


def build_target(cut: Cut, folder: Path, *, replace: bool = True) -> TargetModel:
    """Build the target, prove it, and publish it as a Hugging Face folder.

    Args:
        cut: What to build.
        folder: Where the target goes.
        replace: Whether an older target in `folder`, or whatever is there, is replaced. If not, only an empty folder
            or a damaged target of this identity is, and one that is whole is taken instead.

    Raises:
        RunFolderError: If something is in `folder` by the end that is not to be replaced.
        SurgeryError: If the selection or the model does not fit, weights are damaged, or the proof fails.
        CorpusError: If the tokenizer has ids that the model has no embedding for.
        StorageError: If the folder cannot be written.
    """
    config, selection, foreign = _fitted_config(cut)
    plan, skeleton, values = plan_target(cut, config, selection)
    for source in plan.sources:
        if source.files.is_pickle:
            logger.info("%s: pickle files, read with torch.load(mmap=True, weights_only=True)", source.role)
    keeps = (lambda _: False) if replace else lambda there: find_target(there, cut.identity, verify=True) is not None
    replaces = (lambda _: True) if replace else lambda there: may_replace(there, cut.identity)
    with staged(folder, keeps, replaces) as temporary, storage_errors(folder):
        write_configs(temporary, skeleton, None if foreign else cut.reference)
        if cut.tokenizer is not None:
            cut.tokenizer.save_pretrained(temporary)
        if cut.tokenizer_source is not None:
            copy_tokenizer(cut.tokenizer_source, temporary)
        write_shards(temporary, plan.grafts, values)
        tensors = describe_tensors(temporary, plan.grafts, values.of)
        values.drop_fresh()
        proven = prove(temporary, plan, skeleton, half=cut.target.width == "half")
        report = {**_describe(cut, selection, plan, skeleton, values), "proof": proven, "tensors": tensors}
        write_json(temporary / REPORT, report)
        licence = copy_licence(cut.reference.folder, temporary) if cut.reference else ""
        write_text(temporary / "README.md", target_card(report, licence, cut.command))
        write_json(temporary / MANIFEST, {"identity": cut.identity, "files": describe_files(temporary)})
    return TargetModel(folder, report)


def _fitted_config(cut: Cut) -> "tuple[PreTrainedConfig, tuple[int, ...], bool]":
    """The target's config with its tokenizer's special ids, the selection, and whether that tokenizer is foreign."""
    config, selection = make_config(cut.target, cut.reference_config)
    tokenizer, reference = cut.tokenizer, cut.reference
    if tokenizer is None:
        return config, selection, reference is None
    check_vocabulary(len(tokenizer), config.vocab_size)
    foreign = reference is None or not is_own_tokenizer(tokenizer, reference)
    if foreign:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if foreign and reference is not None:
        config.pad_token_id = tokenizer.pad_token_id
        logger.info("tokenizer: not the reference's own, so the inherited embeddings and head belong to other tokens")
    return config, selection, foreign


def _describe(
    cut: Cut, selection: tuple[int, ...], plan: TensorMap, skeleton: MetaModel, values: TargetValues
) -> dict[str, Any]:
    """What inheritance.json says of a target as a whole."""
    return {
        "reference": cut.reference.identity if cut.reference else None,
        "previous": cut.previous.identity if cut.previous else None,
        "previous_blocks": sum(source.role == "previous" for source, _ in plan.steps),
        "select": cut.target.select,
        "selection": list(selection),
        "inherit": cut.target.inherit if cut.reference else "none",
        "width": cut.target.width,
        "seed": cut.seed,
        "blocks": skeleton.blocks.depth,
        **count_parameters(skeleton),
        **_kept(plan, values, skeleton),
        "left_out": plan.left_out,
    }


def make_config(
    target: Target, reference_config: "PreTrainedConfig | None"
) -> "tuple[PreTrainedConfig, tuple[int, ...]]":
    """The target's config, and the blocks of the reference that it keeps (none from scratch)."""
    if reference_config is None:
        assert target.shape is not None  # the recipe's own check
        config = build_config(target.shape)
        selection: tuple[int, ...] = ()
    else:
        check_decoder(reference_config)
        scores = read_scores(target.block_scores)
        selection = parse(target.select or "").blocks(num_blocks(reference_config), scores)
        config = cut_config(reference_config, selection)
        if target.width == "half":
            config = halve_config(config)
    set_dropout(config, target.dropout)
    config.use_cache = True  # a wish of generation; the trainer itself never keeps a cache
    return config, selection


def plan_target(
    cut: Cut, config: "PreTrainedConfig", selection: tuple[int, ...]
) -> tuple[TensorMap, MetaModel, TargetValues]:
    """List every tensor of the target with its source, and check that the model takes them all.

    Args:
        cut: What to build.
        config: The target's (`make_config`).
        selection: Kept blocks of the reference.

    Raises:
        SurgeryError: If the sources are damaged, or the model cannot be cut so.
    """
    target, reference, previous = cut.target, cut.reference, cut.previous
    if previous is not None and (target.inherit != "all" or target.width != "full"):
        raise SurgeryError(
            f"previous: {previous.name} grows as it is, nothing of it is made anew",
            allowed="inherit: all and width: full",
        )
    if reference is None:
        skeleton = MetaModel(config)
        plan = plan_copies(skeleton, [], None, ())
        return plan, skeleton, TargetValues(skeleton, plan, half=target.width == "half", seed=cut.seed)
    origin = SourceModel("reference", reference.folder, load_config(reference.folder))
    steps, outer = [(origin, block) for block in selection], origin
    if previous is not None:
        outer = _earlier(previous, origin, reference, selection)
        steps[: outer.skeleton.blocks.depth] = [(outer, block) for block in range(outer.skeleton.blocks.depth)]
    skeleton = MetaModel(config, torch.promote_types(origin.dtype, outer.dtype), path=origin.skeleton.blocks.path)
    if target.width == "full":
        for place, (source, block) in enumerate(steps):
            check_same_blocks(source.skeleton, block, skeleton, place)
    plan = plan_copies(skeleton, steps, outer, inherited_parts(target.inherit))
    values = TargetValues(skeleton, plan, half=target.width == "half", seed=cut.seed)
    try:
        skeleton.load({graft.name: values.meta(graft) for graft in plan.grafts if graft.source})
    except SurgeryError as error:
        raise SurgeryError(
            f"a {config.model_type} model cannot be cut so: tensors outside the blocks have a part for each block, or "
            f"the blocks are not alike\n{error.problem.partition(chr(10))[2]}",
            allowed="a model whose blocks are all that depends on their number",
        ) from None
    return plan, skeleton, values


def _earlier(
    previous: Previous, origin: SourceModel, reference: ReferenceModel, selection: tuple[int, ...]
) -> SourceModel:
    """The target of the round before, checked to be cut from the same reference with the beginning of the selection.

    Raises:
        SurgeryError: If it has as many blocks as are asked for now, is another model, or tells nothing of its origin.
    """
    source = SourceModel("previous", previous.folder, load_config(previous.folder))
    depth = source.skeleton.blocks.depth
    if depth >= len(selection):
        raise SurgeryError(
            f"previous: {previous.name} has {depth} blocks, and the selection keeps {len(selection)}",
            allowed="a selection with more blocks than the target that grows",
        )
    expected = cut_config(origin.config, selection[:depth]).to_dict()
    found = source.config.to_dict()
    differing = sorted(
        key
        for key in {*expected, *found} - _FREE_KEYS
        if not DROPOUT_KEY.search(key) and expected.get(key) != found.get(key)
    )
    report = read_json(previous.folder / REPORT) or read_json(previous.folder.parent / REPORT)
    if not isinstance(report, dict) or "selection" not in report:
        raise SurgeryError(
            f"previous: {previous.name} does not tell what it was cut from: there is no {REPORT} in it or beside it",
            allowed="a folder that `inherit` built, or the export inside its run folder",
        )
    if report["selection"] != list(selection[:depth]):
        differing.append(f"its selection is {report['selection']}")
    if (report["reference"] or {}).get("weights_sha256") != reference.weights_sha256:
        differing.append("the reference that it was cut from")
    if differing:
        raise SurgeryError(
            f"previous: {previous.name} is not the first {depth} blocks of this selection of {origin.folder}; it "
            f"differs in {', '.join(differing)}",
            allowed="a target that was cut from the same reference with the beginning of the same selection",
        )
    return source


def _kept(plan: TensorMap, values: TargetValues, skeleton: MetaModel) -> dict[str, int]:
    """Inherited parameters, in all and in blocks; buffers that a file holds are none."""
    names = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    kept = [graft for graft in plan.grafts if graft.source is not None and graft.module_name in names]
    sizes = [(values.meta(graft).numel(), graft.block is not None) for graft in kept]
    inside = sum(size for size, in_block in sizes if in_block)
    return {"inherited_parameters": sum(size for size, _ in sizes), "inherited_block_parameters": inside}


def check_vocabulary(tokenizer_size: int, model_size: int) -> None:
    """Refuse a tokenizer with more entries than the model has embeddings.

    Raises:
        CorpusError: Naming both sizes.
    """
    if tokenizer_size > model_size:
        raise CorpusError(
            f"the tokenizer has {tokenizer_size} entries, the model's vocabulary {model_size}",
            allowed=f"a tokenizer with at most {model_size} entries",
            action="bring the tokenizer that belongs to the model; in a recipe, leave corpus.tokenizer out to use the "
            "reference's own, or give target.shape a larger vocab_size",
        )
