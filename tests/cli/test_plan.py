"""The verb `plan`: its options and exit codes."""

import pytest

from inheritune_ds.cli import main

STUDENT = ["plan", "--recipe", "openllama-3b-13l", "--deepspeed_config", "ds_configs/a6000.json"]


def test_plan_takes_an_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDENT, "--gpu", "a6000", "--gpus", "4", "--mfu", "0.4"]) == 0
    assert "at 40 % MFU" in capsys.readouterr().out


def test_plan_refuses_what_does_not_fit_after_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDENT, "--gpu", "4090"]) == 3
    captured = capsys.readouterr()
    assert "42.1 of 24 GiB: does not fit" in captured.out
    assert (
        "2 sequences of 2048 tokens need 42.1 GiB, 13.5 GiB of it Adam moments, but a rank has 24.0 GiB" in captured.err
    )
    assert "do: use ds_configs/zero3_offload.json" in captured.err


def test_plan_refuses_an_mfu_above_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDENT, "--mfu", "40"]) == 3
    assert "MFU 40.0 is not possible\n  allowed: above 0, at most 1" in capsys.readouterr().err
