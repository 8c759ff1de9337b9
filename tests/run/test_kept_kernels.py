"""A run that has begun keeps its kernels; a named one replaces them, but not the optimizer."""

from pathlib import Path

import pytest

from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.errors import RecipeError, RunFolderError
from inheritune_ds.run.kept_kernels import keep, kept_request, refuse_replaced_loss
from inheritune_ds.training.kernels import Kernels

TAKEN = Kernels("sdpa", "torch_fused", liger=False, loss="chunked", compile=True, activation_checkpointing="none")


def begun(folder: Path) -> Path:
    keep(folder, TAKEN)
    checkpoint = folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    return folder


def test_auto_is_what_the_first_launch_took(tmp_path: Path) -> None:
    assert kept_request(begun(tmp_path), KernelRequest(), pytest.fail) == KernelRequest(**TAKEN.as_dict())


def test_before_the_first_checkpoint_auto_stays_auto(tmp_path: Path) -> None:
    keep(tmp_path, TAKEN)
    assert kept_request(tmp_path, KernelRequest(), pytest.fail) == KernelRequest()
    assert kept_request(tmp_path / "new", KernelRequest(), pytest.fail) == KernelRequest()


def test_a_named_kernel_replaces_a_kept_one(tmp_path: Path) -> None:
    lines: list[str] = []
    kept = kept_request(begun(tmp_path), KernelRequest(attention="eager", compile=False, loss="chunked"), lines.append)
    assert (kept.attention, kept.compile, kept.loss) == ("eager", False, "chunked")
    rounds = "later steps round otherwise than an uninterrupted run"
    assert lines == [
        f"WARNING: kernels.attention is eager, and was sdpa before: {rounds}",
        f"WARNING: kernels.compile is False, and was True before: {rounds}",
    ]


def test_another_optimizer_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as caught:
        kept_request(begun(tmp_path), KernelRequest(optimizer="apex"), pytest.fail)
    assert "kernels.optimizer is apex, and the checkpoints hold the state of torch_fused" in caught.value.problem
    assert '"optimizer": "torch_fused"' in caught.value.action


def test_an_offloaded_optimizer_is_asked_for_by_offload_alone(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    keep(
        folder,
        Kernels("sdpa", "deepspeed_cpu", liger=False, loss="chunked", compile=False, activation_checkpointing="none"),
    )
    assert kept_request(folder, KernelRequest(), pytest.fail).optimizer == "auto"


def test_a_named_loss_that_the_model_cannot_have_is_refused() -> None:
    plain = Kernels("sdpa", "torch", liger=False, loss="plain", compile=False, activation_checkpointing="none")
    refuse_replaced_loss(KernelRequest(), plain, "capped")
    refuse_replaced_loss(KernelRequest(loss="plain"), plain, "")
    with pytest.raises(RecipeError, match=r"kernels\.loss: chunked is named, but it cannot be used: capped"):
        refuse_replaced_loss(KernelRequest(loss="chunked"), plain, "capped")
