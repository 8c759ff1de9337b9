"""Write the files beside a target's tensors: config, generation config, tokenizer, license."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from inheritune_ds.errors import CorpusError, SurgeryError
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.surgery.load import own_tokenizer
from inheritune_ds.surgery.meta_model import MetaModel
from inheritune_ds.surgery.older_names import rename_tokenizer, save_config
from inheritune_ds.surgery.reference import TOKENIZER_PATTERNS, ReferenceModel, matching_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
_LICENSE_FILES = re.compile(r"(licen[cs]e|notice|use_policy)", re.IGNORECASE)


def write_configs(folder: Path, skeleton: MetaModel, reference: ReferenceModel | None) -> None:
    """Write a target's config, and the generation config of its reference if it has one."""
    from transformers import GenerationConfig

    config = skeleton.config
    config.architectures = [type(skeleton.model).__name__]
    config.dtype = skeleton.dtype
    save_config(config, folder)
    if reference is None:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    elif (path := reference.folder / GENERATION).is_file():
        if not isinstance(read_json(path), dict):
            raise SurgeryError(f"{path} is not a JSON object", action="download the file again, or remove it")
        shutil.copyfile(path, folder / GENERATION)
    else:  # old models keep their generation settings in config.json
        old: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
        GenerationConfig.from_pretrained(reference.folder, **old).save_pretrained(folder)
    if not config.use_cache:
        write_json(folder / GENERATION, {**read_json(folder / GENERATION), "use_cache": False})


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of a model folder; unchanged unless transformers 5 wrote them (`rename_tokenizer`)."""
    for path in matching_files(source, TOKENIZER_PATTERNS):
        shutil.copyfile(path, folder / path.name)
    rename_tokenizer(folder)


def copy_license(source: Path, folder: Path) -> str:
    """Copy the reference's license files; return the license that its card names, or ""."""
    for path in sorted(source.iterdir()):
        if path.is_file() and _LICENSE_FILES.match(path.name):
            shutil.copyfile(path, folder / path.name)
    try:
        card = (source / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        named = YAML(typ="safe", pure=True).load(front.group(1))["license"] if front else ""
    except (YAMLError, KeyError, TypeError):
        return ""
    names = named if isinstance(named, list) else [named]
    return ", ".join(str(name) for name in names if name)


def is_own_tokenizer(tokenizer: "PreTrainedTokenizerBase", reference: ReferenceModel) -> bool:
    """Whether a tokenizer has the entries of the reference's; true if the reference has none."""
    try:
        own = own_tokenizer(reference.folder)
    except CorpusError:
        return False  # unreadable, so the corpus was tokenized with another
    return own is None or own.get_vocab() == tokenizer.get_vocab()
