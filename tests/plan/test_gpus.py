"""GPU table, hours and MFU."""

import pytest

from inheritune_ds.errors import RecipeError, TrainingError
from inheritune_ds.plan.gpus import GPUS, gpu, hours, identify, mfu

HOUR_S = 3600.0
STUDENT_FLOPS = 11.3018e9


def test_gpu_is_found_by_name_in_any_case() -> None:
    assert gpu("A6000") is gpu("a6000") is GPUS["a6000"]


def test_gpu_refuses_an_unknown_name_and_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        gpu("a600")
    assert "GPU 'a600' is unknown" in str(caught.value)
    assert "did you mean a6000?" in str(caught.value)
    assert "h200" in caught.value.allowed
    with pytest.raises(RecipeError, match="or no GPU"):
        gpu("abacus")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA A4000", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("T4", None),
    ],
)
def test_identify_knows_the_drivers_names_and_guesses_none(reported: str, name: str | None) -> None:
    found = identify(reported)
    assert (found and found.name) == name


def test_every_gpu_is_faster_within_a_node_than_across_and_in_memory_than_in_links() -> None:
    for card in GPUS.values():
        assert 0 < card.network_gb_per_s <= card.node_gb_per_s < card.memory_gb_per_s


def test_hours_of_one_epoch_of_the_paper() -> None:
    flops = 1e9 * STUDENT_FLOPS
    assert hours(flops, gpu("a6000"), 1, 1.0) == pytest.approx(20.3, abs=0.05)
    assert hours(flops, gpu("a6000"), 1, 0.5) == pytest.approx(40.6, abs=0.05)
    assert hours(flops, gpu("h200"), 2, 0.5) == pytest.approx(6.35 / 2, abs=0.05)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_hours_refuses_a_share_that_no_card_reaches(share: float) -> None:
    with pytest.raises(RecipeError, match=r"MFU .* is not possible"):
        hours(1e18, gpu("a6000"), 1, share)


def test_mfu_is_the_share_of_the_peak_of_all_cards() -> None:
    assert mfu(6_848, STUDENT_FLOPS, gpu("a6000"), 1) == pytest.approx(0.5, abs=1e-3)
    assert mfu(6_848, STUDENT_FLOPS, gpu("a6000"), 2) == pytest.approx(0.25, abs=1e-3)


def test_mfu_above_the_peak_is_an_error_with_the_figures() -> None:
    with pytest.raises(TrainingError) as caught:
        mfu(291_000, STUDENT_FLOPS, gpu("a6000"), 1)
    text = str(caught.value)
    assert "is 2125% of the peak of 1 x RTX A6000 (154.8 TFLOP/s each): the measurement is wrong" in text
    assert "allowed: at most 100%" in text
