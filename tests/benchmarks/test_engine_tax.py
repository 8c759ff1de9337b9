from dataclasses import replace

import pytest

from benchmarks.engine_tax import comparisons
from benchmarks.peers import comparisons as peers_comparisons
from benchmarks.side_by_side import SHAPES, Setting
from tests.benchmarks.conftest import Rehearse

SETTING = Setting((), ("llama", SHAPES["llama"]), 8, 4, "cpu", "keep", 3, 5, 2.0, 3, 0.1, {}, None, None)


def test_comparisons_have_another_bar_for_a_small_step() -> None:
    usual = {c.name: (c.above, c.below, c.bar, c.at_most) for c in comparisons(SETTING)}
    small = {c.name: c.bar for c in comparisons(replace(SETTING, micro_batch=4, accumulation=1))}
    assert usual["tax of project"] == ("plain_master", "project", 1.03, True)
    assert small["tax of project"] == 1.15
    assert usual["tax of deepspeed"][2] is small["tax of deepspeed"] is None


def test_peers_have_the_promised_bars() -> None:
    def bars(setting: Setting) -> dict[str, float | None]:
        return {c.below: c.bar for c in peers_comparisons(setting)}

    assert bars(SETTING) == {"plain": 1.25, "hf_trainer": 1.2, "litgpt": 1.1, "nanogpt": None}
    assert set(bars(replace(SETTING, shape=("gpt2", SHAPES["gpt2"]))).values()) == {None}
    assert bars(replace(SETTING, device="cuda"))["hf_trainer"] == 1.3


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(300)  # a first start builds DeepSpeed's operators
def test_rehearsal_measures_base_project_and_deepspeed(rehearse: Rehearse) -> None:
    chosen = "plain_master,project,deepspeed"
    result, output = rehearse("engine_tax", "--subjects", chosen)
    (found,) = result["settings"]
    (rounds,) = found["rounds"]
    assert [list(blocks) for blocks in rounds] == [chosen.split(","), chosen.split(",")[::-1]]
    rates = [{name: found["step_tokens"] * steps / s for name, (steps, s, _) in blocks.items()} for blocks in rounds]
    expected = [rate["plain_master"] / rate["project"] for rate in rates]
    tax = found["ratios"]["tax of project"]
    assert sorted((tax["min"], tax["max"])) == pytest.approx(sorted(expected))
    for name in ("plain_master", "project", "deepspeed"):
        # untrained, on random tokens: ln 512 = 6.24
        assert found["subjects"][name]["loss"] == pytest.approx(6.24, abs=0.1)
    assert "kernels.compile: off (named)" in " ".join(found["subjects"]["project"]["notes"])
    assert "tax of project" in output
