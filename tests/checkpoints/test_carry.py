"""Optimizer state carried across a change of depth, against plain AdamW with a count of updates a parameter."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from tests import tiny
from tests.checkpoints.drive_carry import BETAS, LR, SOURCE_STEPS, STEPS, carried_names, recipe, windows
from tests.launching import launch
from tests.warm_python import WarmPython

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(600)]
STAGES = (1, 2, 3)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    tokens = windows(number)
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def plain(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW that keeps state and count for each parameter by itself."""
    decays = [p for name, p in model.named_parameters() if "proj" in name or "lm_head" in name]
    others = [p for name, p in model.named_parameters() if not ("proj" in name or "lm_head" in name)]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8)


@pytest.fixture(scope="module")
def expected() -> list[dict[str, torch.Tensor]]:
    """Parameters of the larger model after each update."""
    small, large = tiny.model(recipe(1)), tiny.model(recipe(2))
    source, optimizer = plain(small), plain(large)
    for number in range(SOURCE_STEPS):
        train(small, source, number)
    by_name, grown = dict(small.named_parameters()), dict(large.named_parameters())
    for name, origin in carried_names(large).items():
        optimizer.state[grown[name]] = {key: value.clone() for key, value in source.state[by_name[origin]].items()}
    found = []
    for number in range(SOURCE_STEPS, SOURCE_STEPS + STEPS):
        train(large, optimizer, number)
        found.append({name: value.detach().clone() for name, value in grown.items()})
    return found


@pytest.fixture(scope="module")
def measured(warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder: Path = tmp_path_factory.mktemp("carry")
    found: dict[str, torch.Tensor] = {}
    for ranks in (2, 1):
        launch(warm, folder, "tests/checkpoints/drive_carry.py", str(folder), ",".join(map(str, STAGES)), ranks=ranks)
        found |= load_file(folder / f"{ranks}.safetensors")
    return found


def differences(
    measured: dict[str, torch.Tensor], expected: list[dict[str, torch.Tensor]], titles: set[str]
) -> dict[str, float]:
    """Largest difference of each case as a share of the parameter's largest value."""
    found = dict.fromkeys(titles, 0.0)
    for key, value in measured.items():
        title, step, name = key.split("|")
        if title in found:
            right = expected[int(step)][name]
            found[title] = max(found[title], float((value - right).abs().max() / right.abs().max()))
    return found


def test_three_updates_of_carried_and_new_blocks_are_those_of_plain_adamw(
    measured: dict[str, torch.Tensor], expected: list[dict[str, torch.Tensor]]
) -> None:
    titles = {f"{stage}-{ranks}" for stage in STAGES for ranks in (1, 2)}
    steps = {key.split("|")[1] for key in measured if key.split("|")[0] in titles}
    assert steps == {"0", "1", "2"}
    assert max(differences(measured, expected, titles).values()) < 1e-6


def test_a_resumed_and_resharded_run_keeps_both_counts(
    measured: dict[str, torch.Tensor], expected: list[dict[str, torch.Tensor]]
) -> None:
    pairs = {
        f"grown-{saved}-{ranks} -> {stage}-{now}"
        for saved in STAGES
        for stage in STAGES
        for ranks, now in ((2, 2), (2, 1), (1, 1))
    }
    assert pairs <= {key.split("|")[0] for key in measured}
    assert max(differences(measured, expected, pairs).values()) < 1e-6


def test_a_new_block_under_an_old_count_would_take_three_times_the_step(
    expected: list[dict[str, torch.Tensor]],
) -> None:
    """What the groups prevent, and what the comparisons above would see."""
    large = tiny.model(recipe(2))
    optimizer = plain(large)
    for parameter in large.parameters():
        zeros = torch.zeros_like(parameter)
        optimizer.state[parameter] = {"step": torch.tensor(1e5), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    name = "model.layers.0.self_attn.q_proj.weight"
    before = large.get_parameter(name).detach().clone()
    train(large, optimizer, SOURCE_STEPS)
    wrong = float((large.get_parameter(name).detach() - before).abs().max())
    right = float((expected[0][name] - before).abs().max())
    assert wrong / right == pytest.approx(0.1 / 0.001**0.5, rel=0.02)
