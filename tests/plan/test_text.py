"""The printed plan: figures, width, and that it needs no torch."""

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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


def test_plan_of_the_paper_gives_all_figures_and_the_verdict() -> None:
    text = plan_of("openllama-3b-13l")
    budget = section(text, "budget")
    for figure in (
        "parameters 1.816B total (1,815,638,400), 1.611B of them in 13 blocks of 123.9M",
        "tokens per step 131,072 = micro-batch 2 x accumulation 32 x ranks 1 x seq_len 2048",
        "unique tokens 960,492,709 (estimate) steps 61,035 tokens seen 7,999,979,520 epochs 8.33 (estimate)",
        "FLOPs 11.3 GFLOP a token, 9.04e+19 in all",
        "checkpoint 20.3 GiB (21,787,660,800 bytes), every 200 steps",
        "download 11.1 GiB openlm-research/open_llama_3b: 6.4 GiB",
        "disk 107.6 GiB checkpoints (2 kept, 2 in hand): 81.2 GiB",
    ):
        assert figure in budget
    assert "1 x RTX A6000 6,848 324.5 162.2 324.5 45.2 of 48 GiB: fits" in section(text, "hours")
    claim = section(text, "published claim")
    assert claim.startswith('8B tokens cannot fit the "under 12 hours on one A6000" of the paper')
    assert "the floor is 162.2 hours" in claim


def test_plan_shows_the_resolved_pair_and_the_choices() -> None:
    text = plan_of("quickstart", config="zero1")
    assert "  select: first:4" in text
    config = text[text.index("{") : text.index("\n}\n") + 2]
    assert json.loads(config)["gradient_accumulation_steps"] == 1
    assert "train_micro_batch_size_per_gpu: 16 (auto" in section(text, "choices made")


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.json")))
@pytest.mark.parametrize("name", shipped_names())
def test_plan_of_every_recipe_and_config_is_no_wider_than_its_width(name: str, config: str) -> None:
    lines = plan_of(name, config=config).splitlines()
    assert max(map(len, lines)) <= WIDTH == 110
    assert lines == [line.rstrip() for line in lines]


def test_plan_lists_the_common_gpus_or_the_one_asked_for() -> None:
    several = section(plan_of("openllama-3b-13l"), "hours")
    assert all(label in several for label in ("RTX A6000", "A100 80GB", "H100 SXM", "H200 SXM"))
    one = section(plan_of("openllama-3b-13l", gpu="4090"), "hours")
    assert "GeForce RTX 4090" in one
    assert "does not fit" in one
    assert "A6000" not in one
    with pytest.raises(RecipeError, match="did you mean a6000"):
        plan_of("openllama-3b-13l", gpu="a600")


def test_plan_divides_hours_by_the_ranks() -> None:
    text = section(plan_of("openllama-3b-13l-250m", world_size=4, gpu="h200"), "hours")
    assert "4 x H200 SXM 169,907 0.4 0.2" in text


def test_plan_calls_hours_of_a_tiny_run_under_a_tenth() -> None:
    assert "under 0.1 under 0.1" in section(plan_of("quickstart", gpu="h200"), "hours")


def test_plan_warns_that_fp32_takes_longer_than_the_peaks() -> None:
    assert "this config computes in fp32" in section(
        plan_of("quickstart", config="cpu", machine=Machine("cpu", 16.0, bf16=False)), "hours"
    )
    assert "fp32" not in section(plan_of("quickstart", config="a6000"), "hours")


def test_plan_shows_memory_by_part_and_what_the_host_holds() -> None:
    parts = section(plan_of("openllama-3b-13l"), "memory")
    assert parts.startswith("GiB backward pass update weights 3.38 3.38 fp32 gradient accumulator 6.76 6.76")
    assert "activations 7.32 - logits and loss 1.00 - copies - 3.19 margin 3.11 2.85 total 45.25 39.86" in parts
    assert "ZeRO-1, bf16, ranks: 1; none recomputed, chunked loss" in parts
    sizes = "2 with gradients summed in fp32, 4 with gradients summed in bf16."
    assert parts.endswith(f"Largest micro-batch in 48 GiB (RTX A6000): {sizes}")
    offloaded = section(plan_of("openllama-3b-13l", config="zero3_offload"), "memory")
    assert "on the host, a rank 37.20" in offloaded


def test_plan_says_that_zero_1_fits_too_or_what_it_would_need() -> None:
    fits = section(plan_of("gpt2-medium-16l", config="zero2", world_size=3), "memory")
    assert "ZeRO-1 without offload fits, too (" in fits
    assert fits.endswith("and reduces gradients once a step: take ds_configs/zero1.json.")
    rtx = Machine("cuda", 24.0, bf16=True)
    offloaded = section(plan_of("openllama-3b-13l", config="zero3_offload", gpu="4090", machine=rtx), "memory")
    assert "ZeRO-1 without offload would need " in offloaded


def test_plan_of_fp32_names_one_largest_micro_batch() -> None:
    text = section(plan_of("quickstart", config="cpu", machine=Machine("cpu", 16.0, bf16=False)), "memory")
    assert text.endswith("Largest micro-batch in 48 GiB (RTX A6000): 16.")


def test_plan_counts_with_the_mfu_that_is_given() -> None:
    text = section(plan_of("openllama-3b-13l", gpu="a6000", mfu=0.25), "hours")
    assert "at 25 % MFU" in text
    assert "1 x RTX A6000 3,424 649.0 162.2 649.0" in text
    with pytest.raises(RecipeError, match=r"MFU 1\.5 is not possible"):
        plan_of("openllama-3b-13l", mfu=1.5)


def test_plan_tells_the_hfu_of_full_recomputation_and_counts_it_in_the_floor() -> None:
    recipe = load_recipe("openllama-3b-13l")
    document = {"kernels": {"activation_checkpointing": "full"}}
    resolved = resolve_for(recipe, document, "test", world_size=1, machine=A6000)
    budget = checked_budget(recipe, resolved, None, 1)
    told = budget_text(budget, notes=(), gpu="a6000")
    hours = section(told, "hours")
    assert "Activations are computed again: 14.86 GFLOP a token, so that 50 % MFU is 66 % HFU." in hours
    assert "324.5 213.4" in hours
    assert "--- scaling" not in told
    with pytest.raises(RecipeError, match=r"MFU 0\.9 is 118% of the peak when activations are computed again"):
        budget_text(budget, notes=(), gpu="a6000", mfu=0.9)


def test_plan_is_for_the_gpu_that_is_here_when_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [DetectedGpu("NVIDIA H200", 140.0, (9, 0))]
    monkeypatch.setattr("inheritune_ds.plan.text.detect_gpus", lambda: here)
    text = plan_of("openllama-3b-13l", world_size=2)
    first = [line.split()[2] for line in text.splitlines() if line.startswith("2 x ")]
    assert (first[0], len(first)) == ("H200", 4)
    assert "H200 SXM at 50 % MFU on one GPU" in section(text, "scaling")
    assert "RTX A6000 at 50 % MFU" in section(plan_of("openllama-3b-13l", gpu="a6000"), "scaling")


def test_plan_says_that_offload_is_not_in_its_hours() -> None:
    assert "Offload: what goes to" in plan_of("openllama-3b-13l", config="zero3_offload", gpu="4090")


def test_plan_tells_what_ranks_send_and_what_zero_2_pays_for_accumulation() -> None:
    sent = section(plan_of("openllama-3b-13l", world_size=4), "communication of a step")
    assert "gradients all_reduce 2 5.447 454.0 weights all_gather 2 2.723 227.0" in sent
    assert sent.endswith("total 8.170 681.1 12 GB/s within a node, 10 us a message")
    paid = section(plan_of("gpt2-medium-16l", config="zero2", world_size=3, gpu="a100-40"), "communication of a step")
    assert "ZeRO-2 reduces gradients in each of the" in paid
    assert "where ZeRO-1 sends 1.016 GB" in paid
    assert "communication of a step" not in plan_of("openllama-3b-13l")


def test_plan_scales_to_512_gpus_and_marks_what_cannot_be_shared() -> None:
    text = section(plan_of("openllama-3b-13l", gpu="h200"), "scaling")
    assert text.startswith("H200 SXM at 50 % MFU on one GPU; 367 GB/s within a node, 10 us a message; 320 GB/s across")
    assert " 1 2 x 32 0.0 43,7" in text
    assert " 64 1 x 1 " in text
    assert "512 cannot be shared evenly" in text


def test_what_does_not_fit_is_refused_with_advice() -> None:
    recipe = load_recipe("openllama-3b-13l")
    resolved = resolve_for(recipe, read(CONFIGS / "a6000.json"), "a6000", world_size=1, machine=A6000)
    budget = checked_budget(recipe, resolved, None, 1)
    refuse_what_does_not_fit(budget, 48.0)
    with pytest.raises(RecipeError, match=r"2 sequences of 2048 tokens need 45\.2 GiB") as caught:
        refuse_what_does_not_fit(budget, 44.0)
    assert caught.value.action == "set train_micro_batch_size_per_gpu to 1"
    unknown = load_recipe("quickstart", ["reference.model=EleutherAI/pythia-160m"])
    refuse_what_does_not_fit(checked_budget(unknown, replace(resolved, shape=None), None, 1), 0.1)


def test_plan_marks_counts_as_an_estimate_only_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "tokens" / "abc"
    folder.mkdir(parents=True)
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
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    budget = section(plan_of("gpt2-medium-24l", cache_dir=tmp_path), "budget")
    assert "unique tokens 9,035,582,198 steps 100,000 tokens seen 39,321,600,000 epochs 4.35 FLOPs" in budget
    before = section(plan_of("gpt2-medium-24l"), "budget")
    assert "(estimate) steps 100,000 tokens seen 39,321,600,000 epochs 3.83 (estimate) FLOPs" in before


def test_plan_says_what_is_unknown_until_the_hub_is_read() -> None:
    text = plan_of("quickstart", "reference.model=EleutherAI/pythia-160m", "training.duration=2 epochs")
    budget = section(text, "budget")
    assert "parameters unknown until the reference is read" in budget
    assert "download size unknown EleutherAI/pythia-160m: size unknown" in budget
    assert section(text, "hours") == section(text, "memory") == "unknown until the reference is read"


def test_plan_says_what_is_unknown_until_the_corpus_is_read() -> None:
    sources = "corpus.sources=[{kind: hub, dataset: a/b, data_files: '*.jsonl'}]"
    text = plan_of("quickstart", sources, "training.duration=2 epochs")
    budget = section(text, "budget")
    for label in ("unique tokens", "steps", "tokens seen", "epochs"):
        assert f"{label} unknown until the corpus is tokenized" in budget
    assert "0.008681 GFLOP a token, unknown until the corpus is tokenized" in budget
    assert section(text, "hours") == "unknown until the corpus is tokenized"


def test_plan_counts_what_is_known_of_a_download() -> None:
    sources = "corpus.sources=[{kind: hub, dataset: a/b, data_files: '*', download_gib: 2.0}]"
    budget = section(plan_of("quickstart", sources, "reference.model=c/d"), "budget")
    assert "download 2.0 GiB and what has no known size c/d: size unknown a/b: 2.0 GiB" in budget


def test_plan_tells_that_a_recipe_is_trained_first() -> None:
    budget = section(plan_of("quickstart"), "budget")
    assert "download nothing recipe:quickstart-reference is trained first when it is missing" in budget


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("target.select=first:9", SurgeryError),
        ("corpus.sources=[{kind: files, paths: [nowhere.txt]}]", CorpusError),
        ("training.duration=9 tokens", RecipeError),
    ],
)
def test_plan_refuses_what_does_not_fit(override: str, kind: type[InherituneError]) -> None:
    with pytest.raises(kind):
        plan_of("quickstart", override, config="zero1")


@pytest.mark.parametrize("duration", ["20 steps", "40_960 tokens", "5 epochs"])
def test_plan_refuses_a_warm_up_as_long_as_the_run(duration: str, tmp_path: Path) -> None:
    words = ["quickstart", "training.global_batch_tokens=2048", f"training.duration={duration}"]
    recipe = load_recipe(words[0], words[1:])
    if duration == "5 epochs":
        assert "(estimate)" in section(plan_of(*words, "corpus.max_tokens=8300"), "budget")  # a guess refuses nothing
    folder = tmp_path / "tokens" / "abc"
    folder.mkdir(parents=True)
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
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
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
