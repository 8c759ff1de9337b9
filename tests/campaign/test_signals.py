"""The short forms of the campaign's parts `signals_python`, `signals_deepspeed` and `signals_torchrun`."""

from itertools import product

from benchmarks.campaign.signals import SIGNALS, WHERE, trials


def test_every_signal_is_sent_everywhere_to_everybody() -> None:
    for launcher in ("deepspeed", "torchrun"):
        listed = {(trial.where, trial.number, trial.who) for trial in trials(launcher)}
        assert listed >= set(product(WHERE, SIGNALS, ("one", "all", "twice")))
    assert {(trial.where, trial.number) for trial in trials("python")} == set(product(WHERE, SIGNALS))
