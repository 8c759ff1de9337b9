import pytest

from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.errors import RecipeError
from inheritune_ds.run.stages import refuse_replaced_loss
from inheritune_ds.training.kernels import Kernels


def test_named_loss_that_the_model_cannot_use_is_refused() -> None:
    plain = Kernels("sdpa", "torch", liger=False, loss="plain", compile=False, activation_checkpointing="none")
    refuse_replaced_loss(KernelRequest(), plain, "capped")
    refuse_replaced_loss(KernelRequest(loss="plain"), plain, "")
    with pytest.raises(RecipeError, match=r"kernels\.loss: chunked is named, but it cannot be used: capped"):
        refuse_replaced_loss(KernelRequest(loss="chunked"), plain, "capped")
