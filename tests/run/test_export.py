import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from inheritune_ds.config.model import Shape, Target
from inheritune_ds.errors import ExportError, StorageError
from inheritune_ds.run import export
from inheritune_ds.run.export import check_logits, export_model, model_card, write_probe
from inheritune_ds.surgery.compare import weights_sha256
from inheritune_ds.surgery.inherit import Cut, build_target
from inheritune_ds.surgery.load import load_model
from inheritune_ds.training.kernels import Kernels
from tests import tiny

PROBE = torch.arange(12).view(1, 12) % 20
EAGER = Kernels("sdpa", "torch_fused", liger=False, loss="chunked", compile=False, activation_checkpointing="none")
COMPILED = replace(EAGER, compile=True)
CPU = torch.device("cpu")
CARD = "---\nlibrary_name: transformers\n---\n# a card\n"


@pytest.fixture
def family() -> str:
    """Tests may parametrize it."""
    return "llama"


@pytest.fixture
def target(family: str, tmp_path: Path) -> Path:
    shape = Shape.model_validate(
        {**tiny.LLAMA, "model_type": family, "vocab_size": 20, "tie_word_embeddings": family == "gpt2"}
    )
    words = {word: number for number, word in enumerate(["<s>", "</s>", *(f"w{n}" for n in range(18))])}
    model = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    parts: dict[str, Any] = {"identity": {}, "command": "make it", "reference": None, "reference_config": None}
    return build_target(
        Cut(target=Target(shape=shape), seed=1, tokenizer=tokenizer, **parts), tmp_path / "target"
    ).folder


@pytest.fixture
def model(target: Path) -> PreTrainedModel:
    """The target with other values in every parameter, as training leaves it."""
    found = load_model(target)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    found.eval()
    return found


@pytest.fixture
def write(target: Path, model: PreTrainedModel, tmp_path: Path) -> Callable[..., str]:
    def make(*, dtype: str = "float32", **parameters: torch.Tensor) -> str:
        values = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return export_model(
            tmp_path / "export",
            target_folder=target,
            tokenizer_folder=target,
            parameters={**values, **parameters}.items(),
            dtype=dtype,
            card=CARD,
            recipe_fingerprint="abc",
        )

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_export_loads_anywhere_as_the_trained_model(
    model: PreTrainedModel, write: Callable[..., str], tmp_path: Path
) -> None:
    digest = write()
    folder = tmp_path / "export"
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    assert digest == weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict())
    with torch.no_grad():
        logits = model(input_ids=PROBE).logits
        assert torch.equal(loaded(input_ids=PROBE).logits, logits)
    check_logits(folder, PROBE, logits, EAGER, CPU)
    bent = logits.clone()
    bent[0, 3, 5] += 0.25
    with pytest.raises(ExportError, match=r"export differ from the trained state's by up to 0\.25\n"):
        check_logits(folder, PROBE, bent, EAGER, CPU)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert (folder / "README.md").read_text(encoding="utf-8") == CARD
    names = {"README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors"}
    assert names <= {path.name for path in folder.iterdir()}
    assert not (folder / "inheritance.json").exists()
    assert loaded.dtype == torch.float32
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["weights_sha256"], manifest["recipe_fingerprint"]) == (digest, "abc")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= manifest["files"].keys()


def test_export_in_bfloat16_rounds_every_value(
    model: PreTrainedModel, write: Callable[..., str], tmp_path: Path
) -> None:
    write(dtype="bfloat16")
    stored = load_file(tmp_path / "export" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter.detach().to(torch.bfloat16)), name
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["dtype"] == "bfloat16"


def test_full_disk_is_a_storage_error(write: Callable[..., str], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, limits[1]))
    try:
        with pytest.raises(StorageError, match="export cannot be written: File too large"):
            write()
        with pytest.raises(StorageError, match=r"probe.safetensors cannot be written: File too large"):
            write_probe(tmp_path / "probe.safetensors", torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, 4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "export").exists()


def test_export_refuses_parameters_that_are_not_the_target_s(write: Callable[..., str], tmp_path: Path) -> None:
    problem = r"the trained parameters are not the target's: \['module\.extra'\]"
    with pytest.raises(ExportError, match=problem) as caught:
        write(**{"module.extra": torch.zeros(1)})
    assert caught.value.exit_code == 12
    assert not (tmp_path / "export").exists()


def test_export_that_differs_when_loaded_is_not_published(
    target: Path, write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bent(folder: Path, **options: Any) -> PreTrainedModel:
        loaded = load_model(folder, **options)
        if folder != target:
            with torch.no_grad():
                loaded.get_parameter("model.norm.weight")[0] *= -1
        return loaded

    monkeypatch.setattr(export, "load_model", bent)
    with pytest.raises(ExportError, match="does not load as the trained model") as caught:
        write()
    assert caught.value.action.startswith("check the disk")
    assert list(tmp_path.iterdir()) == [target]


def test_check_logits_allows_another_rounding_only_where_kernels_round_differently(
    model: PreTrainedModel, write: Callable[..., str], tmp_path: Path
) -> None:
    write()
    with torch.no_grad():
        eager = model(input_ids=PROBE).logits
        logits = model.double()(input_ids=PROBE).logits.float()  # the same weights, rounded in other places
    model.float()
    assert not torch.equal(eager, logits)
    check_logits(tmp_path / "export", PROBE, logits, COMPILED, CPU)
    with pytest.raises(ExportError, match="allowed: the same bits"):
        check_logits(tmp_path / "export", PROBE, logits, EAGER, CPU)
    with torch.no_grad():  # weights rounded to bf16 are never within the tolerance
        rounded = model.bfloat16().float()(input_ids=PROBE).logits
    with pytest.raises(ExportError, match=r"allowed: at most [\d.e-]+, since the training's kernels round differently"):
        check_logits(tmp_path / "export", PROBE, rounded, COMPILED, CPU)


def test_check_logits_computes_with_the_attention_of_the_training(
    model: PreTrainedModel, write: Callable[..., str], tmp_path: Path
) -> None:
    write()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=PROBE).logits
    check_logits(tmp_path / "export", PROBE, logits, replace(EAGER, attention="eager"), CPU)
    with pytest.raises(ExportError):
        check_logits(tmp_path / "export", PROBE, logits, EAGER, CPU)


def test_write_probe_keeps_tokens_and_logits(tmp_path: Path) -> None:
    logits = torch.randn(1, 20, 12).transpose(1, 2)
    write_probe(tmp_path / "probe.safetensors", PROBE, logits)
    found = load_file(tmp_path / "probe.safetensors")
    assert torch.equal(found["tokens"], PROBE)
    assert torch.equal(found["logits"], logits)


RESULT = {
    "parameters": 1_840_256,
    "block_parameters": 791_552,
    "blocks": 4,
    "steps": 200,
    "tokens_seen": 819_200,
    "unique_tokens": 700_000,
    "precision": "fp32",
    "zero_stage": 1,
    "world_size": 2,
    "val_loss": 3.14159,
    "val_stderr": 0.02,
    "version": "0.1.0",
}


def test_model_card_states_the_lineage() -> None:
    report = {
        "selection": [0, 1, 2, 3],
        "reference": {"name": "org/model", "commit": "0123abc", "weights_sha256": {}},
        "width": "full",
        "tensors": [*[{"inherited": True, "part": "mlp"}] * 2, {"inherited": False, "part": "final_norm"}],
    }
    recipe = {"name": "mine", "description": "what it is", "seed": 7}
    card = model_card(recipe, report, RESULT)
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in (
        "# mine",
        "blocks [0, 1, 2, 3] of `org/model` at commit `0123abc`",
        "1 of 3 tensors were fresh (final_norm).",
        "1,840,256 (791,552 in 4 blocks)",
        "819,200 tokens seen (700,000 unique)",
        "precision fp32, ZeRO stage 1, 2 rank(s)",
        "3.1416 +- 0.0200 nats per token",
        '"seed": 7',
    ):
        assert text in card
    folder = {**report, "reference": {"name": "./here", "commit": "", "weights_sha256": {}}}
    assert "of `./here`; 1 of 3" in model_card(recipe, folder, RESULT)
    scratch = {"selection": [], "reference": None, "tensors": [{"inherited": False}]}
    assert "random values; nothing was inherited." in model_card(recipe, scratch, RESULT)
