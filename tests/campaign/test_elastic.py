"""Elastic resume: which changes the full form tries."""

from benchmarks.campaign.elastic import PART, TOLERANCE
from benchmarks.campaign.resumes import windows_of


def test_full_form_has_all_changes_of_stage_and_size() -> None:
    pairs = {(one, other) for one in (1, 2, 3) for other in (1, 2, 3) if one != other}
    for precision in TOLERANCE:
        assert {f"zero{one}-to-zero{other}-{precision}" for one, other in pairs} <= set(PART.cases)
        assert {f"ranks-2-1-4-2-zero{stage}-{precision}" for stage in (1, 2, 3)} <= set(PART.cases)


def test_windows_of_returns_the_order_of_the_global_batch() -> None:
    def rank(*micro_batches: list[str]) -> dict[str, dict[str, dict[str, list[list[str]]]]]:
        return {"0": {"windows": {"3": list(micro_batches)}}}

    two = [rank(["a", "b"], ["e", "f"]), rank(["c", "d"], ["g", "h"])]
    one = [rank(["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"])]
    assert windows_of(two, 0, 3) == windows_of(one, 0, 3) == list("abcdefgh")
