import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.checkpoints.train_state import FaultState, TrainState, batch_of


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Ranges of batch numbers, ascending and apart."""
    ends = sorted(draw(st.sets(st.integers(0, 60), max_size=8)))
    return tuple(zip(ends[0::2], ends[1::2], strict=False))


@given(ranges())
def test_steps_read_every_batch_once_and_in_order_but_the_skipped_ones(skipped: tuple[tuple[int, int], ...]) -> None:
    read = [batch_of(step, skipped) for step in range(40)]
    apart = {number for first, end in skipped for number in range(first, end)}
    assert read == [number for number in range(200) if number not in apart][:40]
    assert all(one < other for one, other in pairwise(read))


@given(st.builds(FaultState, st.integers(0, 9), st.integers(0, 9), st.lists(st.floats(0, 99)).map(tuple)), ranges())
def test_state_is_restored_from_json_to_the_last_bit(faults: FaultState, skipped: tuple[tuple[int, int], ...]) -> None:
    state = TrainState(7, 512, 1, 0.1 + 0.2, faults, skipped)
    assert TrainState.of(json.loads(json.dumps(state.as_dict()))) == state
