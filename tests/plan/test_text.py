"""The printed plan: figures, width, and no import of torch."""

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.deepspeed import Machine
from inheritune_ds.config.deepspeed_checks import read
from inheritune_ds.config.loading import load_recipe, shipped_names
from inheritune_ds.data.size import count_tokens
from inheritune_ds.errors import CorpusError, InherituneError, RecipeError, SurgeryError
from inheritune_ds.plan.machine import DetectedGpu
from inheritune_ds.plan.micro_batch import resolve_for
from inheritune_ds.plan.tables import WIDTH
from inheritune_ds.plan.text import budget_text, checked_budget, plan, refuse_what_does_not_fit

CONFIGS = Path(__file__).parents[2] / "ds_configs"
A6000 = Machine(kind="cuda", memory_gib=48.0, bf16=True)
RTX, FP32 = Machine("cuda", 24.0, bf16=True), Machine("cpu", 16.0, bf16=False)
LLAMA, SHORT_LLAMA, GPT2 = "openllama-3b-13l", "openllama-3b-13l-250m", "gpt2-medium-16l"
UNKNOWN_MODEL = "quickstart reference.model=EleutherAI/pythia-160m"
HUB_SOURCE = '{"kind":"hub","dataset":"a/b","data_files":"*","download_gib":2.0}'
PARTLY_UNKNOWN = f"quickstart reference.model=c/d corpus.sources=[{HUB_SOURCE}]"


def plan_of(
    name: str,
    *overrides: str,
    config: str = "a6000",
    world_size: int = 1,
    gpu: str | None = None,
    cache_dir: Path = Path("no-such-cache"),
    machine: Machine = A6000,
    mfu: float = 0.5,
) -> str:
    recipe = load_recipe(name, overrides)
    path = CONFIGS / f"{config}.json"
    resolved = resolve_for(recipe, read(path), str(path), world_size=world_size, machine=machine)
    budget = checked_budget(recipe, resolved, count_tokens(recipe.corpus, cache_dir), world_size)
    return plan(budget, resolved.config, notes=resolved.notes, gpu=gpu, mfu=mfu)


def section(text: str, title: str) -> str:
    """The lines under a heading, joined by single spaces."""
    start = text.index(f"--- {title}")
    lines = text[start:].splitlines()[1:]
    end = next((number for number, line in enumerate(lines) if line.startswith("---")), len(lines))
    return " ".join(" ".join(lines[:end]).split())


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (LLAMA, {}, "budget", "parameters 1.816B total (1,815,638,400), 1.611B of them in 13 blocks of 123.9M"),
    (LLAMA, {}, "budget", "tokens per step 131,072 = micro-batch 2 x accumulation 32 x ranks 1 x seq_len 2048"),
    (
        LLAMA,
        {},
        "budget",
        "unique tokens 938,740,000 (estimate) steps 61,035 tokens seen 7,999,979,520 epochs 8.52 (estimate)",
    ),
    (LLAMA, {}, "budget", "FLOPs 11.3 GFLOP per token, 9.04e+19 in total"),
    (LLAMA, {}, "budget", "checkpoint 20.3 GiB (21,787,660,800 bytes), every 200 steps"),
    (LLAMA, {}, "budget", "download 11.1 GiB openlm-research/open_llama_3b: 6.4 GiB"),
    (LLAMA, {}, "budget", "disk 107.6 GiB checkpoints (2 kept, 2 in hand): 81.2 GiB"),
    (LLAMA, {}, "hours", "1 x RTX A6000 6,848 324.5 154.9 324.5 42.1 of 48 GiB: fits"),
    (LLAMA, {}, "hours", "A100 80GB"),
    (LLAMA, {}, "hours", "H100 SXM"),
    (LLAMA, {}, "hours", "H200 SXM"),
    (LLAMA, {}, "published claim", '8B tokens cannot fit the "under 12 hours on one A6000" of the paper'),
    (LLAMA, {}, "published claim", "the floor is 154.9 hours"),
    (LLAMA, {}, "memory", "GiB backward pass update weights 3.38 3.38 fp32 gradient accumulator 6.76 6.76"),
    (LLAMA, {}, "memory", "activations 7.69 - logits and loss 1.00 - margin 2.96 2.52 total 42.08 32.96"),
    (LLAMA, {}, "memory", "ZeRO-1, bf16, ranks: 1; none recomputed, chunked loss"),
    (LLAMA, {}, "memory", "(RTX A6000): 2 with gradients summed in fp32, 4 with gradients summed in bf16."),
    ("quickstart", {"config": "zero1"}, "choices made", "train_micro_batch_size_per_gpu: 16 (auto"),
    (LLAMA, {"gpu": "4090"}, "hours", "GeForce RTX 4090"),
    (LLAMA, {"gpu": "4090"}, "hours", "does not fit"),
    (SHORT_LLAMA, {"world_size": 4, "gpu": "h200"}, "hours", "4 x H200 SXM 169,907 0.4 0.2"),
    ("quickstart", {"gpu": "h200"}, "hours", "under 0.1 under 0.1"),
    ("quickstart", {"config": "cpu", "machine": FP32}, "hours", "this config computes in fp32"),
    ("quickstart", {"config": "cpu", "machine": FP32}, "memory", "Largest micro-batch in 48 GiB (RTX A6000): 16."),
    (LLAMA, {"config": "zero3_offload"}, "memory", "on the host, per rank 37.20"),
    (LLAMA, {"config": "zero3_offload", "gpu": "4090"}, "hours", "Offload: these figures do not include transfers"),
    (LLAMA, {"config": "zero3_offload", "gpu": "4090", "machine": RTX}, "memory", "ZeRO-1 without offload would need "),
    (GPT2, {"config": "zero2", "world_size": 3}, "memory", "ZeRO-1 without offload also fits ("),
    (
        GPT2,
        {"config": "zero2", "world_size": 3},
        "memory",
        " and reduces gradients once per step: use ds_configs/zero1.json.",
    ),
    (LLAMA, {"gpu": "a6000", "mfu": 0.25}, "hours", "at 25 % MFU"),
    (LLAMA, {"gpu": "a6000", "mfu": 0.25}, "hours", "1 x RTX A6000 3,424 649.0 154.9 649.0"),
    (
        LLAMA,
        {"world_size": 4},
        "communication of a step",
        "gradients all_reduce 2 5.447 454.0 weights all_gather 2 2.723 227.0",
    ),
    (LLAMA, {"world_size": 4}, "communication of a step", "total 8.170 681.1 12 GB/s within a node, 10 us per message"),
    (
        GPT2,
        {"config": "zero2", "world_size": 3, "gpu": "a100-40"},
        "communication of a step",
        "ZeRO-2 reduces gradients in each of the",
    ),
    (
        GPT2,
        {"config": "zero2", "world_size": 3, "gpu": "a100-40"},
        "communication of a step",
        "where ZeRO-1 sends 1.016 GB",
    ),
    (
        LLAMA,
        {"gpu": "h200"},
        "scaling",
        "H200 SXM at 50 % MFU on one GPU; 367 GB/s within a node, 10 us per message; 320 GB/s across",
    ),
    (LLAMA, {"gpu": "h200"}, "scaling", " 1 2 x 32 0.0 43,7"),
    (LLAMA, {"gpu": "h200"}, "scaling", " 64 1 x 1 "),
    (LLAMA, {"gpu": "h200"}, "scaling", "512 cannot be shared evenly"),
    (UNKNOWN_MODEL, {}, "hours", "unknown until the reference is read"),
    (UNKNOWN_MODEL, {}, "memory", "unknown until the reference is read"),
    (UNKNOWN_MODEL, {}, "budget", "parameters unknown until the reference is read"),
    (UNKNOWN_MODEL, {}, "budget", "download size unknown EleutherAI/pythia-160m: size unknown"),
    (PARTLY_UNKNOWN, {}, "budget", "download 2.0 GiB and an unknown size c/d: size unknown a/b: 2.0 GiB"),
    ("quickstart", {}, "budget", "download nothing recipe:quickstart-reference is trained first if missing"),
]


@pytest.mark.parametrize(("words", "options", "title", "text"), CASES)
def test_plan_shows(words: str, options: dict[str, Any], title: str, text: str) -> None:
    assert text in section(plan_of(*words.split(), **options), title)


def test_plan_shows_the_resolved_pair() -> None:
    text = plan_of("quickstart", config="zero1")
    assert "  select: first:4" in text
    config = text[text.index("{") : text.index("\n}\n") + 2]
    assert json.loads(config)["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.json")))
@pytest.mark.parametrize("name", shipped_names())
def test_plan_of_every_recipe_and_config_is_no_wider_than_its_width(name: str, config: str) -> None:
    lines = plan_of(name, config=config).splitlines()
    assert max(map(len, lines)) <= WIDTH == 110
    assert lines == [line.rstrip() for line in lines]


def test_plan_has_only_the_sections_and_gpus_that_apply() -> None:
    assert "A6000" not in section(plan_of(LLAMA, gpu="4090"), "hours")
    assert "fp32" not in section(plan_of("quickstart"), "hours")
    assert "communication of a step" not in plan_of(LLAMA)


@pytest.mark.parametrize(
    ("options", "message"), [({"gpu": "a600"}, "did you mean a6000"), ({"mfu": 1.5}, r"MFU 1\.5 is not possible")]
)
def test_plan_refuses_an_unknown_gpu_and_an_impossible_mfu(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(LLAMA, **options)


def test_plan_reports_the_hfu_of_full_recomputation_and_includes_it_in_the_floor() -> None:
    recipe = load_recipe(LLAMA)
    document = {"kernels": {"activation_checkpointing": "full"}}
    resolved = resolve_for(recipe, document, "test", world_size=1, machine=A6000)
    budget = checked_budget(recipe, resolved, None, 1)
    text = budget_text(budget, notes=(), gpu="a6000")
    hours = section(text, "hours")
    assert "Activations are recomputed: 14.86 GFLOP per token, so that 50 % MFU is 66 % HFU." in hours
    assert "324.5 203.6" in hours
    assert "--- scaling" not in text
    with pytest.raises(RecipeError, match=r"MFU 0\.9 is 118% of the peak when activations are recomputed"):
        budget_text(budget, notes=(), gpu="a6000", mfu=0.9)


def test_plan_starts_with_this_machines_gpu_when_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [DetectedGpu("NVIDIA H200", 140.0, (9, 0), 140.0)]
    monkeypatch.setattr("inheritune_ds.plan.text.detect_gpus", lambda: here)
    text = plan_of("openllama-3b-13l", world_size=2)
    first = [line.split()[2] for line in text.splitlines() if line.startswith("2 x ")]
    assert (first[0], len(first)) == ("H200", 4)
    assert "H200 SXM at 50 % MFU on one GPU" in section(text, "scaling")
    assert "RTX A6000 at 50 % MFU" in section(plan_of("openllama-3b-13l", gpu="a6000"), "scaling")


def test_a_run_that_does_not_fit_is_refused_with_advice() -> None:
    recipe = load_recipe("openllama-3b-13l")
    resolved = resolve_for(recipe, read(CONFIGS / "a6000.json"), "a6000", world_size=1, machine=A6000)
    budget = checked_budget(recipe, resolved, None, 1)
    refuse_what_does_not_fit(budget, 48.0)
    with pytest.raises(RecipeError, match=r"2 sequences of 2048 tokens need 42\.1 GiB") as caught:
        refuse_what_does_not_fit(budget, 40.0)
    assert caught.value.action == "set train_micro_batch_size_per_gpu to 1"
    unknown = load_recipe("quickstart", ["reference.model=EleutherAI/pythia-160m"])
    refuse_what_does_not_fit(checked_budget(unknown, replace(resolved, shape=None), None, 1), 0.1)


def cache_with(folder: Path, manifest: dict[str, Any]) -> Path:
    """A cache with the manifest of token files."""
    tokens = folder / "tokens" / "abc"
    tokens.mkdir(parents=True)
    (tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_plan_marks_counts_as_an_estimate_only_before_tokenization(tmp_path: Path) -> None:
    recipe = load_recipe("gpt2-medium-24l")
    identity = {
        "kind": "hub",
        "dataset": "Skylion007/openwebtext",
        "data_files": "plain_text/*.parquet",
        "split": None,
        "text_field": "text",
        "max_tokens": None,
    }
    manifest = {
        "tokenizer": {"name": recipe.corpus.tokenizer},
        "corpus": recipe.corpus.model_dump(include={"validation_ratio", "max_tokens", "token_dtype"}),
        "sources": [{"identity": identity, "train_tokens": 9_035_582_198}],
    }
    budget = section(plan_of("gpt2-medium-24l", cache_dir=cache_with(tmp_path, manifest)), "budget")
    assert "unique tokens 9,035,582,198 steps 100,000 tokens seen 39,321,600,000 epochs 4.35 FLOPs" in budget
    before = section(plan_of("gpt2-medium-24l"), "budget")
    assert "(estimate) steps 100,000 tokens seen 39,321,600,000 epochs 4.35 (estimate) FLOPs" in before


def test_plan_marks_figures_as_unknown_until_the_corpus_is_tokenized() -> None:
    sources = "corpus.sources=[{kind: hub, dataset: a/b, data_files: '*.jsonl'}]"
    text = plan_of("quickstart", sources, "training.duration=2 epochs")
    budget = section(text, "budget")
    for label in ("unique tokens", "steps", "tokens seen", "epochs"):
        assert f"{label} unknown until the corpus is tokenized" in budget
    assert "0.008681 GFLOP per token, unknown until the corpus is tokenized" in budget
    assert section(text, "hours") == "unknown until the corpus is tokenized"


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("target.select=first:9", SurgeryError),
        ("corpus.sources=[{kind: files, paths: [nowhere.txt]}]", CorpusError),
        ("training.duration=9 tokens", RecipeError),
    ],
)
def test_plan_refuses_impossible_recipes(override: str, kind: type[InherituneError]) -> None:
    with pytest.raises(kind):
        plan_of("quickstart", override, config="zero1")


@pytest.mark.parametrize("duration", ["20 steps", "40_960 tokens", "5 epochs"])
def test_plan_refuses_a_warm_up_as_long_as_the_run(duration: str, tmp_path: Path) -> None:
    words = ["quickstart", "training.global_batch_tokens=2048", f"training.duration={duration}"]
    recipe = load_recipe(words[0], words[1:])
    if duration == "5 epochs":
        assert "(estimate)" in section(
            plan_of(*words, "corpus.max_tokens=8300"), "budget"
        )  # an estimate refuses nothing
    manifest = {
        "tokenizer": {"train": recipe.corpus.tokenizer.vocab_size},  # type: ignore[union-attr]
        "corpus": recipe.corpus.model_dump(include={"validation_ratio", "max_tokens", "token_dtype"}),
        "sources": [
            {
                "identity": {"kind": "embedded", "python": platform.python_version(), "max_tokens": None},
                "train_tokens": 8300,
            }
        ],
    }
    cache_with(tmp_path, manifest)
    with pytest.raises(RecipeError, match=r"schedule\.warmup_steps 20 is too long for the 20 steps of the run"):
        plan_of(*words, cache_dir=tmp_path)
    assert "steps 20 " in section(plan_of(*words, "schedule.warmup_steps=2", cache_dir=tmp_path), "budget")


def test_plan_needs_no_heavy_library() -> None:
    script = (
        "import sys; from tests_plan import plan_of; plan_of('openllama-3b-13l');"
        "heavy = {'torch', 'deepspeed', 'transformers', 'tokenizers', 'datasets', 'wandb', 'matplotlib', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    loader = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('tests_plan', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); sys.modules['tests_plan'] = module;"
        "spec.loader.exec_module(module);"
    )
    result = subprocess.run(
        [sys.executable, "-c", loader + script, __file__], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"
