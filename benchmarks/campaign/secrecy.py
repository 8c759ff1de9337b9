"""Canary secrets in the environment, on the command line and in documents: nothing that is written holds one.

Also here: code in foreign files is never run (`foreign_code.py`).
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.campaign import foreign_code
from benchmarks.campaign.launching import (
    RANKS,
    TROUBLED,
    Launcher,
    TinyRun,
    arguments,
    run_to_end,
    status,
    write_ds_config,
    write_recipe,
)
from benchmarks.campaign.part import Cases, Figures, Part, totals
from inheritune_ds.storage.files import read_json

MARKER = "c4n4ry"
"""Part of every secret here, and of nothing else."""
SECRETS = {
    "HF_TOKEN": f"hf_{MARKER}AbCdEfGhIjKlMnOpQrStUvWx",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{MARKER}ZyXwVuTsRqPoNmLkJiHgFe",
    "WANDB_API_KEY": f"{MARKER}0123456789abcdef0123456789abcdef01"[:40],
    "STORE_SECRET": f"{MARKER}/with+signs=and 'quotes'",
    "OUR_PASSWORD": f"{MARKER}-pass-word",
    "HTTPS_PROXY": f"http://somebody:{MARKER}-of-the-proxy@127.0.0.1:9",
    "WANDB_BASE_URL": f"http://somebody:{MARKER}-of-the-tracker@127.0.0.1:9",
}


def holders(folder: Path, inputs: Iterable[Path] = ()) -> list[str]:
    """Files below a folder that hold the marker, packed or not, except `inputs`."""
    skipped = set(inputs)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in skipped)
    found = []
    for path in files:
        content = path.read_bytes()
        if any(MARKER.encode() in part for part in (str(path.relative_to(folder)).encode(), content, *_unpacked(path))):
            found.append(str(path.relative_to(folder)))
    return found


def _unpacked(path: Path) -> Iterator[bytes]:
    """Contents of a packed file."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    elif content[:1] == b"\x78":
        try:
            yield zlib.decompress(content)
        except zlib.error:
            return
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # uncompressed members appear in the content itself
            yield from (archive.read(item) for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED)


def secret_environment(folder: Path) -> dict[str, Any]:
    """The secrets, W&B offline, and a home of its own, so that all that is written lies below `folder`."""
    home = folder / "home"
    (home / ".cache").mkdir(parents=True)
    (folder / "tmp").mkdir()
    compiled = Path.home() / ".cache" / "torch_extensions"
    if compiled.is_dir():  # a link, so that the operator of DeepSpeed is not compiled again
        (home / ".cache" / "torch_extensions").symlink_to(compiled)
    return {
        **SECRETS,
        "HOME": str(home),
        "TMPDIR": str(folder / "tmp"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "WANDB_MODE": "offline",
    }


def a_finished_run(folder: Path, *, launcher: Launcher) -> Figures:
    """A run from corpus to export, with W&B."""
    tiny = TinyRun(folder, launcher)
    tiny.to_end(**secret_environment(folder))
    assert status(tiny.path)["state"] == "finished", status(tiny.path)
    assert list(tiny.path.glob("wandb/offline-run-*/*.wandb")), "W&B has written nothing, so nothing was proven of it"
    return _clean(folder)


def a_traceback(folder: Path, *, launcher: Launcher) -> Figures:
    """A defect whose message holds secrets: in the log and in status.json they are masked."""
    tiny = TinyRun(folder, launcher)
    output = tiny.to_end(expect=1, script=TROUBLED, TROUBLE="secret:", **secret_environment(folder))
    masked = "cannot log in with *** at http://***@127.0.0.1:9"
    assert f"RuntimeError: {masked}" in output, output[-3000:]
    assert masked in status(tiny.path)["reason"], status(tiny.path)
    return _clean(folder)


def refused_documents(folder: Path) -> Figures:
    """Secrets in a recipe, an override, a DeepSpeed config and the arguments: refused, and not repeated."""
    plain, config = write_recipe(folder), write_ds_config(folder)
    secret, word, url = SECRETS["STORE_SECRET"], SECRETS["OUR_PASSWORD"], f"https://me:{MARKER}@host/data"
    recipe = folder / "secret.yaml"
    recipe.write_text(json.dumps({**(read_json(plain) or {}), "description": f"key {secret}"}), encoding="utf-8")
    document = folder / "secret.json"
    document.write_text(json.dumps({**(read_json(config) or {}), "wandb": {"team": url}}), encoding="utf-8")
    environment = secret_environment(folder)
    trials: list[tuple[int, str, list[str]]] = [
        (3, "description holds the secret of the environment variable", arguments(recipe, config, folder)),
        (3, "wandb.team holds a URL with user name", arguments(plain, document, folder)),
        (3, "override name holds", arguments(plain, config, folder, f"name={secret}")),
        (3, "override reference.model holds a URL", arguments(plain, config, folder, f"reference.model={url}")),
        (2, "unrecognized arguments: --hub_token ***", arguments(plain, config, folder, "--hub_token", word)),
        (3, "cannot be read", arguments(Path(secret), config, folder)),
    ]
    for code, message, words in trials:
        output = run_to_end(folder, *words, expect=code, **environment)
        assert message in output, output
    assert not (folder / "runs").exists(), "a refused document has made a run folder"
    return _clean(folder, (recipe, document))


def _clean(folder: Path, inputs: Iterable[Path] = ()) -> Figures:
    found = holders(folder, inputs)
    assert found == [], f"secrets in {found}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"files_searched": len(files), "bytes_searched": sum(path.stat().st_size for path in files), "hits": 0}


_CASES: Cases = {
    **{
        f"{name}-{launcher}": partial(run, launcher=launcher)
        for name, run in (("finished", a_finished_run), ("traceback", a_traceback))
        for launcher in RANKS
    },
    "refused": refused_documents,
    **foreign_code.CASES,
}


def _summary(figures: list[Figures]) -> Figures:
    counted = totals("files_searched", "bytes_searched", "hits", "foreign_files", "canaries_made")
    return {"secrets": sorted(SECRETS), **counted(figures)}


PART = Part(
    "secrets",
    11,
    "No secret appears in any file or output, and code in foreign files is never run.",
    _CASES,
    ("refused", "traceback-python", *foreign_code.SHORT),
    _summary,
)
