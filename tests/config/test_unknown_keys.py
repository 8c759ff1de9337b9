"""The nearest name that the message of an unknown key suggests."""

from collections.abc import Callable

import pytest

from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.deepspeed_keys import Fp16, OffloadOptimizer, PassedOn, Zero
from inheritune_ds.config.fields import ConfigModel
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.errors import RecipeError

Resolve = Callable[..., Resolved]


def misspelled(name: str) -> list[str]:
    """A letter left out, one doubled, two swapped."""
    middle = len(name) // 2
    left, right = name[:middle], name[middle:]
    return [left + right[1:], left + right[0] + right, left[:-1] + right[0] + left[-1] + right[1:]]


def document_with(path: str) -> dict[str, object]:
    """A DeepSpeed config with a micro-batch and one key."""
    value: object = "auto"
    for part in reversed(path.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return {"train_micro_batch_size_per_gpu": 8, **value}


BLOCKS: dict[str, type[ConfigModel]] = {
    "": PassedOn,
    "zero_optimization.": Zero,
    "zero_optimization.offload_optimizer.": OffloadOptimizer,
    "fp16.": Fp16,
    "kernels.": KernelRequest,
}
NAMES = [f"{prefix}{name}" for prefix, model in BLOCKS.items() for name in model.model_fields if len(name) > 3]


@pytest.mark.parametrize("path", NAMES)
def test_a_misspelled_key_leads_back_to_the_key(path: str, resolved: Resolve) -> None:
    prefix, _, name = path.rpartition(".")
    for wrong in {*misspelled(name)} - {name}:
        with pytest.raises(RecipeError, match="unknown key") as caught:
            resolved(document_with(f"{prefix}.{wrong}".removeprefix(".")))
        assert caught.value.action == f"did you mean {path}?"


@pytest.mark.parametrize(
    "name", ["zero_hpz", "zero_quantised", "hierarchical_gather", "use_flash_attn", "moe", "lora", "grad_compression"]
)
def test_a_key_that_nobody_knows_suggests_no_feature(name: str, resolved: Resolve) -> None:
    for path in (name, f"zero_optimization.{name}"):
        with pytest.raises(RecipeError) as caught:
            resolved(document_with(path))
        assert caught.value.action == f"remove {path}"
