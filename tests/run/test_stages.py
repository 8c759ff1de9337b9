import logging
from types import SimpleNamespace
from typing import Any

import pytest

from inheritune_ds.config.deepspeed import Machine
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.shapes import target_shape
from inheritune_ds.run import stages
from inheritune_ds.run.stages import refuse_replaced_loss
from inheritune_ds.training.kernels import Kernels


def test_named_loss_that_the_model_cannot_use_is_refused() -> None:
    plain = Kernels("sdpa", "torch", liger=False, loss="plain", compile=False, activation_checkpointing="none")
    refuse_replaced_loss(KernelRequest(), plain, "capped")
    refuse_replaced_loss(KernelRequest(loss="plain"), plain, "")
    with pytest.raises(RecipeError, match=r"kernels\.loss: chunked is named, but it cannot be used: capped"):
        refuse_replaced_loss(KernelRequest(loss="chunked"), plain, "capped")


def share_of_peak(name: str, ranks: int = 1) -> Any:
    """tokens/s -> MFU of the shipped 13-block recipe, on ranks whose GPUs have this name."""
    recipe = load_recipe("openllama-3b-13l")
    launch = SimpleNamespace(machine=Machine("cuda", 47.5, bf16=True, name=name), world=SimpleNamespace(size=ranks))
    setup: Any = SimpleNamespace(launch=launch, recipe=recipe, resolved=SimpleNamespace(shape=target_shape(recipe)))
    return stages._utilization(setup)


def test_the_card_of_the_ranks_decides_about_the_peak() -> None:
    """A 3090 as card 0 gave 131 % for a training on the A6000 beside it."""
    tokens_per_s = 8_240.0
    assert share_of_peak("NVIDIA RTX A6000")(tokens_per_s) == pytest.approx(0.6015, abs=1e-3)
    assert share_of_peak("NVIDIA RTX A6000", ranks=2)(tokens_per_s) == pytest.approx(0.3007, abs=1e-3)
    assert share_of_peak("") is None, "ranks with different cards have no common peak"
    assert share_of_peak("NVIDIA A100-SXM4-80GB MIG 3g.40gb") is None


def test_an_impossible_share_of_the_peak_is_logged_once_and_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    share = share_of_peak("NVIDIA GeForce RTX 3090")
    with caplog.at_level(logging.WARNING):
        assert [share(8_240.0), share(8_240.0)] == [None, None]
    (message,) = caplog.messages
    assert message.startswith(
        "perf/mfu is not recorded: 8240 tokens/s x 1.13e+10 FLOP/token is 131% of the peak of 1 x"
    )
    assert share(2_000.0) == pytest.approx(0.318, abs=1e-3)
