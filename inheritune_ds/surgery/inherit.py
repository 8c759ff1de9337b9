"""Build the target: selected blocks of the reference with its embeddings, final norm and head.

The steps: read the sources' headers, map every tensor of the target to its source (`tensor_map`), write the files
(`write_shards`), read them back and compare (`compare`), prove that the model computes the same (`verify`), publish.
Nothing is published unless every step succeeds. With `inherit: none`, or a shape from scratch, all tensors are fresh.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inheritune_ds.config.block_scores import read_scores
from inheritune_ds.config.inheritance import PARTS, inherited_parts
from inheritune_ds.config.model import Reference, Target
from inheritune_ds.config.selection import parse
from inheritune_ds.data.tokens.vocabulary import check_rows
from inheritune_ds.errors import SurgeryError
from inheritune_ds.storage.files import read_json, storage_errors, write_json, write_text
from inheritune_ds.storage.folders import damaged_files, describe_files, staged
from inheritune_ds.surgery.compare import describe_tensors
from inheritune_ds.surgery.config_cut import DROPOUT_KEY, cut_config, keeps_cache, num_blocks, set_dropout
from inheritune_ds.surgery.half_width import halve_config
from inheritune_ds.surgery.load import build_config, load_config
from inheritune_ds.surgery.meta_model import MetaModel, check_decoder, check_same_blocks
from inheritune_ds.surgery.metadata_files import copy_license, copy_tokenizer, is_own_tokenizer, write_configs
from inheritune_ds.surgery.older_names import save_tokenizer
from inheritune_ds.surgery.reference import ReferenceModel, locate
from inheritune_ds.surgery.report import target_card
from inheritune_ds.surgery.tensor_map import SourceModel, plan_copies
from inheritune_ds.surgery.tensor_values import TargetValues
from inheritune_ds.surgery.verify import count_parameters, prove
from inheritune_ds.surgery.write_shards import write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REPORT = "inheritance.json"
_FREE_KEYS = {"dtype", "_name_or_path", "transformers_version", "architectures", "use_cache"}
"""Config keys in which a trained target may differ from a cut of its reference, beside dropout."""


@dataclass(frozen=True)
class TargetModel:
    """A target on disk: its Hugging Face folder and its inheritance report."""

    folder: Path
    report: Mapping[str, Any]


def locate_previous(folder: Path) -> ReferenceModel:
    """Find the target of an earlier round; errors as in `locate`."""
    return dataclasses.replace(locate(Reference(model=str(folder.resolve())), Path), name=str(folder))


def content_of(identity: Any) -> Any:
    """A target's identity without names and places; the hashes of the files that they stand for remain."""
    if isinstance(identity, Mapping):
        places = (
            ("name", "commit") if "weights_sha256" in identity else ("block_scores",) if "select" in identity else ()
        )
        return {key: content_of(value) for key, value in identity.items() if key not in places}
    return identity


def find_target(folder: Path, identity: Mapping[str, Any], *, verify: bool = False) -> TargetModel | None:
    """Open the finished target in `folder`; None unless it has this `identity` and intact files.

    Only sizes are compared; `verify` compares hashes, too.
    """
    manifest, report = read_json(folder / MANIFEST), read_json(folder / REPORT)
    if (
        not isinstance(manifest, dict)
        or not isinstance(report, dict)
        or content_of(manifest.get("identity")) != content_of(identity)
    ):
        return None
    damaged = damaged_files(folder, manifest.get("files"), hashes=verify)
    return None if damaged else TargetModel(folder, report)


def may_replace(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether `folder` holds nothing but a (damaged) target of this `identity`."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("identity") != identity:
        return False
    listed = manifest.get("files")
    own = {MANIFEST, *(listed if isinstance(listed, dict) else ())}
    return all(path.relative_to(folder).as_posix() in own for path in folder.rglob("*") if not path.is_dir())


@dataclass(frozen=True)
class Cut:
    """Inputs of `build_target`."""

    target: Target
    seed: int
    """Of the random values of fresh tensors."""
    identity: Mapping[str, Any]
    """Recorded in the manifest; `find_target` compares it."""
    command: str
    """Rebuilds this target; printed in the model card."""
    reference: ReferenceModel | None
    """None with `inherit: none` or from scratch."""
    reference_config: "PreTrainedConfig | None"
    """None from scratch."""
    previous: ReferenceModel | None = None
    """Target of an earlier round: gives the first blocks; the selection's other blocks come from the reference."""
    tokenizer: "PreTrainedTokenizerBase | None" = None
    """Saved with the target; another tokenizer than the reference's also sets the special ids. None if unreadable."""
    tokenizer_source: Path | None = None
    """Folder with tokenizer files to copy unchanged, over those of `tokenizer`."""


def build_target(cut: Cut, folder: Path, *, replace: bool = True) -> TargetModel:
    """Build the target, prove it, and publish it as a Hugging Face folder.

    With `replace`, any contents of `folder` are replaced. Otherwise only an empty folder or a damaged target of this
    identity is replaced, and an intact one is returned.

    Raises:
        RunFolderError: If `folder` holds something at the end that must not be replaced.
        SurgeryError: If the selection or the model does not fit, weights are damaged, or the proof fails.
        CorpusError: If the tokenizer has ids that the model has no embedding for.
        StorageError: If the folder cannot be written.
    """
    config, selection, foreign = _fitted_config(cut)
    values = plan_target(cut, config, selection)
    plan = values.plan
    for source in plan.sources:
        if source.files.is_pickle:
            logger.info("%s: pickle files, read with torch.load(mmap=True, weights_only=True)", source.role)
    keeps = (lambda _: False) if replace else lambda there: find_target(there, cut.identity, verify=True) is not None
    replaces = (lambda _: True) if replace else lambda there: may_replace(there, cut.identity)
    with staged(folder, keeps, replaces) as temporary, storage_errors(folder):
        write_configs(temporary, values.skeleton, None if foreign else cut.reference)
        if cut.tokenizer is not None:
            save_tokenizer(cut.tokenizer, temporary)
        if cut.tokenizer_source is not None:
            copy_tokenizer(cut.tokenizer_source, temporary)
        write_shards(temporary, plan.grafts, values)
        tensors = describe_tensors(temporary, plan.grafts, values.of)
        values.drop_fresh()
        proven = prove(temporary, values)
        report = {**_describe(cut, selection, values), "proof": proven, "tensors": tensors}
        write_json(temporary / REPORT, report)
        license_name = copy_license(cut.reference.folder, temporary) if cut.reference else ""
        write_text(temporary / "README.md", target_card(report, license_name, cut.command))
        write_json(temporary / MANIFEST, {"identity": cut.identity, "files": describe_files(temporary)})
    return TargetModel(folder, report)


def _fitted_config(cut: Cut) -> "tuple[PreTrainedConfig, tuple[int, ...], bool]":
    """The target's config with its tokenizer's special ids, the selection, and whether the tokenizer is foreign."""
    config, selection = make_config(cut.target, cut.reference_config)
    if not config.use_cache:
        logger.info("no selected block has attention: the target generates without a cache (use_cache: false)")
    tokenizer, reference = cut.tokenizer, cut.reference
    if tokenizer is None:
        return config, selection, reference is None
    check_rows(tokenizer, config.vocab_size)
    foreign = reference is None or not is_own_tokenizer(tokenizer, reference)
    if foreign:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if foreign and reference is not None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = pad if pad is not None and pad < config.vocab_size else None
        logger.info("tokenizer: not the reference's own, so the inherited embeddings and head belong to other tokens")
    return config, selection, foreign


def _describe(cut: Cut, selection: tuple[int, ...], values: TargetValues) -> dict[str, Any]:
    """The entries of inheritance.json about the target as a whole."""
    plan, skeleton = values.plan, values.skeleton
    names = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}  # buffers do not count
    inherited = [graft for graft in plan.grafts if graft.source is not None and graft.module_name in names]
    return {
        "reference": cut.reference.identity if cut.reference else None,
        "previous": cut.previous.weights_identity if cut.previous else None,
        "previous_blocks": sum(source.role == "previous" for source, _ in plan.steps),
        "select": cut.target.select,
        "selection": list(selection),
        "inherit": cut.target.inherit if cut.reference else "none",
        "width": cut.target.width,
        "seed": cut.seed,
        "blocks": skeleton.blocks.depth,
        **count_parameters(skeleton),
        "inherited_parameters": sum(values.meta(graft).numel() for graft in inherited),
        "inherited_block_parameters": sum(values.meta(graft).numel() for graft in inherited if graft.block is not None),
        "left_out": plan.leftovers,
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
    config.use_cache = reference_config is None or keeps_cache(reference_config, config)  # the trainer passes False
    return config, selection


def plan_target(cut: Cut, config: "PreTrainedConfig", selection: tuple[int, ...]) -> TargetValues:
    """Map every tensor of the target to its source, and check that the model accepts them all.

    Raises:
        SurgeryError: If the sources are damaged, or this selection of the model is impossible.
    """
    target, reference, previous = cut.target, cut.reference, cut.previous
    half = target.width == "half"
    if previous is not None and (inherited_parts(target.inherit) != set(PARTS) or half):
        raise SurgeryError(
            f"previous: {previous.name} can only grow with all its tensors kept",
            allowed="inherit: all and width: full",
        )
    if reference is None:
        skeleton = MetaModel(config)
        return TargetValues(skeleton, plan_copies(skeleton, [], None, ()), half=half, seed=cut.seed)
    origin = SourceModel("reference", reference.folder, load_config(reference.folder))
    steps, outer = [(origin, block) for block in selection], origin
    if previous is not None:
        outer = _earlier(previous, origin, reference, selection)
        steps[: outer.skeleton.blocks.depth] = [(outer, block) for block in range(outer.skeleton.blocks.depth)]
    skeleton = MetaModel(config, torch.promote_types(origin.dtype, outer.dtype), path=origin.skeleton.blocks.path)
    if not half:
        for place, (source, block) in enumerate(steps):
            check_same_blocks(source.skeleton, block, skeleton, place)
    plan = plan_copies(skeleton, steps, outer, inherited_parts(target.inherit))
    values = TargetValues(skeleton, plan, half=half, seed=cut.seed)
    try:
        skeleton.load({graft.name: values.meta(graft) for graft in plan.grafts if graft.source})
    except SurgeryError as error:
        raise SurgeryError(
            f"a {config.model_type} model does not allow this selection: tensors outside the blocks have a part for "
            f"each block, or the blocks differ in shape\n{error.problem.partition(chr(10))[2]}",
            allowed="a model in which only the list of blocks depends on the depth",
        ) from None
    return values


def _earlier(
    previous: ReferenceModel, origin: SourceModel, reference: ReferenceModel, selection: tuple[int, ...]
) -> SourceModel:
    """Open the target of the previous round; raise a SurgeryError unless it is a prefix of this cut."""
    source = SourceModel("previous", previous.folder, load_config(previous.folder))
    depth = source.skeleton.blocks.depth
    if depth >= len(selection):
        raise SurgeryError(
            f"previous: {previous.name} has {depth} blocks, and the selection keeps {len(selection)}",
            allowed="a selection with more blocks than the previous target",
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
            f"previous: the origin of {previous.name} is unknown: there is no {REPORT} in it or beside it",
            allowed="a folder that `inherit` built, or the export inside its run folder",
        )
    if report["selection"] != list(selection[:depth]):
        differing.append(f"its selection is {report['selection']}")
    if (report["reference"] or {}).get("weights_sha256") != reference.weights_sha256:
        differing.append("its reference")
    if differing:
        raise SurgeryError(
            f"previous: {previous.name} is not the first {depth} blocks of this selection of {origin.folder}; it "
            f"differs in {', '.join(differing)}",
            allowed="a target of the same reference whose selection is the beginning of this one",
        )
    return source
