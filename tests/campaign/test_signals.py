"""The short forms of the campaign's parts `signals_python`, `signals_deepspeed` and `signals_torchrun`."""

from itertools import product

from benchmarks.campaign.signals import SIGNALS, WHERE, trials


def test_full_form_sends_every_signal_in_every_phase_to_every_group() -> None:
    for launcher in ("deepspeed", "torchrun"):
        listed = {(trial.where, trial.number, trial.who) for trial in trials(launcher)}
        assert listed >= set(product(WHERE, SIGNALS, ("one", "all", "twice")))
    assert {(trial.where, trial.number) for trial in trials("python")} == set(product(WHERE, SIGNALS))
