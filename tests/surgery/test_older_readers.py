"""Cuts and exports, read by the transformers 4 of other programs: the same logits and ids."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from inheritune_ds.run.export import export_model
from inheritune_ds.surgery.load import load_model
from tests.launching import environment
from tests.surgery.families import BLOCKS, random_model, tiny_config
from tests.surgery.tiny import cut, make_tokenizer

VERSIONS = {
    "4.57.3": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
    "4.46.3": ("tokenizers==0.20.3", "huggingface_hub==0.26.5"),
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA_3},
    "gpt2": {},  # no rotary embeddings
    "qwen2": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "layer_types": ["full_attention"] * BLOCKS,
        "use_sliding_window": False,  # as in Qwen2's own files; 4.46 has one kind of attention for all blocks
    },
    "gemma": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
}
TEXT = "w3 w4 </s> w5 unheard w90"
PROBE = torch.arange(48).view(2, 24) % 97
READ = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
text, out, *folders = sys.argv[1:]
probe, found = torch.arange(48).view(2, 24) % 97, {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    assert model.dtype == torch.float32, model.dtype
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=probe).logits
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id, model.generation_config.eos_token_id])
    found |= {f"{folder} logits": logits, f"{folder} ids": ids}
save_file(found, out)
print(json.dumps(__version__))
"""


@pytest.fixture(scope="module", params=VERSIONS)
def older(request: pytest.FixtureRequest) -> Path:
    """Install an older transformers into the cache of the tests, beside this environment's torch."""
    version = request.param
    folder = Path(request.config.cache.mkdir(f"transformers-{version}"))
    if not (folder / "installed").exists():
        packages = [f"transformers=={version}", *VERSIONS[version]]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"transformers {version} cannot be installed here: {done.stderr.strip()[-200:]}")
        (folder / "installed").touch()
    return folder


def build(family: str, folder: Path) -> list[Path]:
    """A cut of a random model, and an export of the cut with other values."""
    config = tiny_config(family)
    config = type(config).from_dict({**config.to_dict(), **SHAPES[family]})
    model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(random_model(family).state_dict())
    model.save_pretrained(folder / "reference")
    target = cut(folder / "reference", folder / "target", select="first:3", words=97).folder
    trained = load_model(target)
    export_model(
        folder / "export",
        target_folder=target,
        tokenizer_folder=target,
        parameters=[(name, value.detach() * 1.25) for name, value in trained.named_parameters()],
        dtype="float32",
        card="",
        recipe_fingerprint="",
    )
    return [target, folder / "export"]


@pytest.mark.thorough
@pytest.mark.timeout(600)  # installs on first use
def test_older_transformers_reads_cuts_and_exports_as_this_one(older: Path, tmp_path: Path) -> None:
    folders = [path for family in SHAPES for path in build(family, tmp_path / family)]
    thetas = [json.loads((path / "config.json").read_text(encoding="utf-8")).get("rope_theta") for path in folders]
    assert 1e4 not in thetas
    out = tmp_path / "found.safetensors"
    there = subprocess.run(
        [sys.executable, "-c", READ, TEXT, str(out), *map(str, folders)],
        env=environment(PYTHONPATH=str(older)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == json.dumps(older.name.removeprefix("transformers-"))
    found, tokenizer = load_file(out), make_tokenizer(97)
    for folder in folders:
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(input_ids=PROBE).logits
        assert (found[f"{folder} logits"] - logits).abs().max() <= 1e-5
        assert found[f"{folder} ids"].tolist() == [*tokenizer(TEXT)["input_ids"], 2, 2]
