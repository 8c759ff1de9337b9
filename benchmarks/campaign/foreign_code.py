"""Foreign files that run code when they are read carelessly: here they are refused or read as data.

Their code would create a folder, the canary, which must never exist.
"""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.campaign.launching import SHAPE, TinyRun, arguments, write_ds_config, write_recipe
from benchmarks.campaign.part import Cases, Figures
from benchmarks.ranks import random_model
from inheritune_ds.checkpoints.manifest import MANIFEST, manifest_text, published, read_manifest
from inheritune_ds.config.model import Shape
from inheritune_ds.storage.files import blake3_file

SHORT = ("pickle-model", "pickle-tokenizer", "code-of-a-repository", "switches")
SWITCHES = ("TRUST_REMOTE_CODE", "HF_TRUST_REMOTE_CODE", "HF_HUB_TRUST_REMOTE_CODE", "HF_DATASETS_TRUST_REMOTE_CODE")
"""Variables that some libraries read, or once read."""


class Evil:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def evil_zip(path: Path, canary: Path) -> None:
    """A file of torch.save with code in it."""
    import torch

    torch.save({"model.norm.weight": torch.ones(32), "module": {}, "more": Evil(canary)}, path)


def evil_pickle(path: Path, canary: Path) -> None:
    """A plain pickle with code in it, as long as the file that it takes the place of."""
    size = path.stat().st_size if path.exists() else 0
    path.write_bytes(pickle.dumps(Evil(canary)).ljust(size, b"\0"))


def command(*words: str) -> tuple[int, str]:
    """Run `inheritune-ds` in this process, every switch for remote code on; exit code and output."""
    from inheritune_ds.cli import main

    output = io.StringIO()
    with patch.dict(os.environ, dict.fromkeys(SWITCHES, "1")), redirect_stdout(output), redirect_stderr(output):
        try:
            code = main(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, output.getvalue()


def write_model(folder: Path) -> Path:
    """A tiny model as `save_pretrained` writes it."""
    random_model(Shape.model_validate(SHAPE)).save_pretrained(folder)
    return folder


def check_harmless(canary: Path, code: int, words: list[str]) -> None:
    """Run a command, which must exit with `code` and leave no canary."""
    ended, output = command(*words)
    assert not canary.exists(), f"code was run by {words}\n{output}"
    assert ended == code, f"exit code {ended}, not {code}\n{output}"


def _inherit(model: Path) -> list[str]:
    """Arguments that cut a model."""
    output = str(model.with_name(f"out-of-{model.name}"))
    return ["inherit", "--reference", str(model), "--select", "first:1", "--output", output]


def pickled_models(folder: Path) -> Figures:
    """Weights that are pickle with code in it, under every name that could be read."""
    canary, model = folder / "canary", write_model(folder / "model")
    index = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}})
    trials: list[tuple[str, int, Callable[[Path, Path], None]]] = [
        ("pytorch_model.bin", 9, evil_zip),
        ("pytorch_model.bin", 9, evil_pickle),
        ("pytorch_model-00001-of-00001.bin", 9, evil_zip),
        ("model.safetensors", 9, evil_zip),
        ("model.safetensors", 9, evil_pickle),
        ("training_args.bin", 0, evil_zip),
        ("optimizer.pt", 0, evil_zip),
    ]
    for number, (name, code, write) in enumerate(trials):
        trial = Path(shutil.copytree(model, folder / f"model-{number}"))
        if code:
            (trial / "model.safetensors").unlink()
        if "-of-" in name:
            (trial / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
        write(trial / name, canary)
        check_harmless(canary, code, _inherit(trial))
    return {"foreign_files": len(trials), "canaries_made": 0}


def pickled_tokenizers(folder: Path) -> Figures:
    """Tokenizer files that are pickle with code in it."""
    canary = folder / "canary"
    trials = (["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.pkl", "vocab.bin"])
    for number, names in enumerate(trials):
        tokenizer = folder / f"trial-{number}" / "tokenizer"
        tokenizer.mkdir(parents=True)
        for name in names:
            evil_pickle(tokenizer / name, canary)
        check_harmless(canary, 6, _prepare(tokenizer.parent, tokenizer))
    return {"foreign_files": sum(map(len, trials)), "canaries_made": 0}


def _prepare(folder: Path, tokenizer: Path) -> list[str]:
    """Arguments that tokenize a corpus with a foreign tokenizer."""
    plain = json.loads(write_recipe(folder).read_text(encoding="utf-8"))
    recipe = write_recipe(folder, corpus={**plain["corpus"], "tokenizer": str(tokenizer)})
    return ["prepare", "--recipe", str(recipe), "--cache-dir", str(folder / "cache"), "--workers", "1"]


def repository_code(folder: Path) -> Figures:
    """Models and tokenizers that bring code of their own: known kinds are loaded by the library's, others refused."""
    canary, model = folder / "canary", write_model(folder / "model")
    module = f"import os\nos.mkdir({str(canary)!r})\n"
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    for number, (kind, code) in enumerate([("llama", 0), ("own", 9)]):
        trial = Path(shutil.copytree(model, folder / f"model-{number}"))
        described = json.loads((trial / "config.json").read_text(encoding="utf-8"))
        changed = {**described, "model_type": kind, "auto_map": auto}
        (trial / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        (trial / "own.py").write_text(module, encoding="utf-8")
        check_harmless(canary, code, _inherit(trial))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    named = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    for name, content in (("tokenizer_config.json", json.dumps(named)), ("own.py", module), ("vocab.json", "{}")):
        (tokenizer / name).write_text(content, encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    check_harmless(canary, 6, _prepare(folder, tokenizer))
    return {"foreign_files": 3, "canaries_made": 0}


def switches(folder: Path) -> Figures:
    """`trust_remote_code` can be asked for nowhere."""
    key = "trust_remote_code"
    recipe, plain = write_recipe(folder), write_ds_config(folder)
    config = folder / "trusting.json"
    config.write_text(json.dumps({key: True}), encoding="utf-8")
    sections = ("reference", "target", "corpus", "training", "export")
    trials = [
        *((3, "unknown key", arguments(recipe, plain, folder, f"{section}.{key}=true")) for section in sections),
        (3, "unknown key", arguments(recipe, plain, folder, f"{key}=true")),
        (3, "unknown key", arguments(recipe, config, folder)),
        (2, "unrecognized arguments", arguments(recipe, plain, folder, f"--{key}")),
    ]
    for code, message, words in trials:
        ended, output = command("train", *words)
        assert (ended, message in output, key in output) == (code, True, True), f"{words}: {ended}\n{output}"
    return {"switches_refused": len(trials)}


def pickled_token_shard(folder: Path) -> Figures:
    """Token files replaced by pickles of the same size: reported, and made again from the corpus."""
    canary, recipe = folder / "canary", write_recipe(folder)
    code, output = command("prepare", "--recipe", str(recipe), "--cache-dir", str(folder / "cache"))
    assert code == 0, output
    shards = sorted((folder / "cache").rglob("*.bin"))
    for shard in shards:
        evil_pickle(shard, canary)
    output = TinyRun(folder).to_end()
    assert not canary.exists(), output[-3000:]
    assert "are damaged; they are remade" in output, output[-3000:]
    return {"foreign_files": len(shards), "canaries_made": 0}


def pickled_checkpoint(folder: Path) -> Figures:
    """Pickle with code in it in place of fragments, under their manifest and under a forged one, at two stages."""
    canary, tiny = folder / "canary", TinyRun(folder)
    tiny.to_end()
    shutil.rmtree(tiny.path / "export")  # so that the run is not finished
    checkpoints = list(published(tiny.path / "checkpoints"))
    shards = [path for checkpoint in checkpoints for path in checkpoint.glob("rank-*.safetensors")]
    for shard in shards:
        evil_zip(shard, canary)
    outputs = [tiny.to_end(expect=4)]
    for checkpoint in checkpoints:
        _forge(checkpoint)
    outputs.append(tiny.to_end(expect=4))
    write_ds_config(folder, stage=2)
    outputs.append(tiny.to_end(expect=4))
    assert not canary.exists(), "\n".join(outputs)[-6000:]
    return {"foreign_files": len(shards) * len(outputs), "canaries_made": 0}


def _forge(checkpoint: Path) -> None:
    """Make the manifest fit the files."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    for name in manifest["files"]:
        path = checkpoint / name
        manifest["files"][name] |= {"bytes": path.stat().st_size, "blake3": blake3_file(path)}
    (checkpoint / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")


CASES: Cases = {
    "pickle-model": pickled_models,
    "pickle-tokenizer": pickled_tokenizers,
    "code-of-a-repository": repository_code,
    "switches": switches,
    "pickle-token-shard": pickled_token_shard,
    "pickle-checkpoint": pickled_checkpoint,
}
