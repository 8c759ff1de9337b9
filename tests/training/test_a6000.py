"""The run of docs/tutorials/one_a6000.md on a pretended A6000: fake facts of the card, a model without weights."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from inheritune_ds.config.deepspeed import Machine, Resolved
from inheritune_ds.config.deepspeed_checks import read
from inheritune_ds.config.loading import DEFAULT_RECIPE, load_recipe
from inheritune_ds.config.zero import read_layout
from inheritune_ds.data.size import count_tokens
from inheritune_ds.plan.memory import memory
from inheritune_ds.plan.micro_batch import resolve_for
from inheritune_ds.plan.model_size import flops_per_token
from inheritune_ds.plan.text import checked_budget, plan
from inheritune_ds.surgery.load import build_config
from inheritune_ds.training import kernels
from inheritune_ds.training.kernel_probes import Obstacle
from inheritune_ds.training.kernels import choose_kernels

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "ds_configs" / "a6000.json"
PAGE = (ROOT / "docs" / "tutorials" / "one_a6000.md").read_text(encoding="utf-8")
NAME, GIB = "NVIDIA RTX A6000", 2**30
INSTALLED = ("flash_attention_2", "sdpa", "eager", "apex", "torch_fused", "torch", "liger", "compile")
"""What docs/how-to/install.md installs for a GPU."""


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Resolved:
    """The config of the run on the card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: NAME)
    machine = Machine("cuda", 47.5, bf16=True, name=NAME)
    return resolve_for(load_recipe(DEFAULT_RECIPE), read(CONFIG), str(CONFIG), world_size=1, machine=machine)


@pytest.fixture
def model_config(resolved: Resolved) -> PreTrainedConfig:
    assert resolved.shape is not None
    shape, blocks = resolved.shape
    return build_config(shape.model_copy(update={"num_hidden_layers": blocks}))


def test_every_choice_is_that_of_the_tutorial(
    resolved: Resolved, model_config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(name: str, *_: object) -> Obstacle | None:
        return None if name in INSTALLED else Obstacle("not installed", f"install {name}")

    for obstacle in ("attention_obstacle", "optimizer_obstacle"):
        monkeypatch.setattr(kernels, obstacle, probe)
    monkeypatch.setattr(kernels, "liger_obstacle", lambda *_: probe("liger"))
    monkeypatch.setattr(kernels, "compile_obstacle", lambda *_: probe("compile"))
    recipe = load_recipe(DEFAULT_RECIPE)
    tokens = 61_035 * recipe.training.global_batch_tokens
    assert resolved.shape is not None
    _, notes = choose_kernels(
        resolved.kernels,
        config=model_config,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        zero_stage=resolved.zero_stage,
        offload=resolved.offloads_optimizer,
        run_flops=float(flops_per_token(*resolved.shape, recipe.training.seq_len) * tokens),
        documents=False,
    )
    listed = PAGE.partition("```text\n")[2].partition("```")[0].splitlines()
    assert listed == [*resolved.notes, *notes]


def test_the_plan_s_parts_are_those_of_the_model_and_add_up(resolved: Resolved, model_config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    count = sum(parameter.numel() for parameter in model.parameters())
    recipe = load_recipe(DEFAULT_RECIPE)
    layout = read_layout(resolved.config, seq_len=recipe.training.seq_len, world_size=1)
    assert resolved.shape is not None
    micro_batch, accumulation = resolved.micro_batch_size, resolved.gradient_accumulation_steps
    need = memory(*resolved.shape, micro_batch_size=micro_batch, accumulation=accumulation, **layout)
    bytes_each = {"weights": 2, "fp32 gradient accumulator": 4, "fp32 master weights": 4, "Adam moments": 8}
    assert {name: need.parts[name] for name in bytes_each} == {
        name: pytest.approx(each * count / GIB) for name, each in bytes_each.items()
    }
    text = plan_text(resolved)
    table = text.partition("--- memory of one GPU\n")[2].partition("\nLargest")[0].splitlines()[1:]
    rows = [re.split(r"\s{2,}", row) for row in table]
    backward = {name: float(size) for name, size, *_ in rows if size != "-"}
    total = backward.pop("total")
    assert sum(backward.values()) == pytest.approx(total, abs=0.03)
    assert f"{total:.1f} of 48 GiB: fits" in text
    assert f"{total:.1f} GiB" in PAGE


def plan_text(resolved: Resolved) -> str:
    recipe = load_recipe(DEFAULT_RECIPE)
    budget = checked_budget(recipe, resolved, count_tokens(recipe.corpus, Path("no-such-cache")), 1)
    return plan(budget, resolved.config, notes=resolved.notes, gpu="a6000")


@pytest.mark.parametrize("text", ["micro-batch 2 x accumulation 32", "1 x RTX A6000 "])
def test_plan_names_micro_batch_and_hours_of_the_tutorial(text: str, resolved: Resolved) -> None:
    line = next(line for line in plan_text(resolved).splitlines() if text in line)
    assert " ".join(line.split()) in " ".join(PAGE.split())
