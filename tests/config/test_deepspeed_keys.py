"""The tables of DeepSpeed's keys and formulas, compared with the installed DeepSpeed and transformers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling import constants as profiling_constants
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import BFLOAT16, BFLOAT16_OLD
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import log_levels
from transformers.integrations.deepspeed import HfDeepSpeedConfig, HfTrainerDeepSpeedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inheritune_ds.config import deepspeed_keys, deepspeed_refused
from inheritune_ds.config.deepspeed import Machine, Resolved
from inheritune_ds.config.deepspeed_checks import read
from inheritune_ds.config.fields import ConfigModel
from inheritune_ds.config.kernels import ATTENTIONS
from inheritune_ds.config.loading import load_recipe, shipped_names
from inheritune_ds.config.reliability import WATCHDOG_S
from inheritune_ds.plan.micro_batch import resolve_for
from inheritune_ds.plan.shapes import target_shape

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
MACHINES = {
    "cpu": Machine(kind="cpu", memory_gib=64.0, bf16=False),
    "h100": Machine(kind="cuda", memory_gib=80.0, bf16=True),
}


def refused(block: str) -> set[str]:
    """The keys of a block that do not work here."""
    paths = (path.removeprefix(f"{block}.") for path in deepspeed_refused.REFUSED if path.startswith(f"{block}."))
    return {path for path in paths if "." not in path}


def test_every_zero_key_of_deepspeed_is_known_or_refused_for_a_reason() -> None:
    """Under both of its names; DeepSpeed's models accept the field's and the alias."""
    fields = DeepSpeedZeroConfig.model_fields
    theirs = {*fields, *(field.alias for field in fields.values() if field.alias)}
    removed = deepspeed_config._REMOVED_ZERO_CONFIG_KEYS.keys()
    assert not deepspeed_keys.Zero.model_fields.keys() & refused("zero_optimization")
    assert theirs | removed == deepspeed_keys.Zero.model_fields.keys() | refused("zero_optimization")


def test_second_names_are_deepspeed_s() -> None:
    aliases = {f"zero_optimization.{name}": field.alias for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for path, first in deepspeed_keys.SECOND_NAMES.items():
        field = DeepSpeedZeroConfig.model_fields.get(path.rpartition(".")[2])
        moved = (field.json_schema_extra or {}).get("new_param") if field else None
        expected = {aliases.get(path), aliases.get(f"zero_optimization.{moved}")}
        assert first in expected or (path, first) == (BFLOAT16_OLD, BFLOAT16)


SAMPLES: list[tuple[Any, Any, Any]] = [
    (deepspeed_keys.Switch, True, "maybe"),
    (deepspeed_keys.Count, 500_000_000.0, -3.5),
    (deepspeed_keys.Positive, 5e8, "half"),
    (deepspeed_keys.Path, "/tmp/nvme", 3),
    (deepspeed_keys.Number, 0.5, "much"),
    (deepspeed_keys.OffloadDevice, "cpu", "gpu"),
    (deepspeed_keys.Zero.__annotations__["stage"], 3, 4),
]
"""A type, a value that it and DeepSpeed accept, and one that both refuse."""
MODELS: list[tuple[type[Any], type[ConfigModel]]] = [
    (DeepSpeedZeroConfig, deepspeed_keys.Zero),
    (DeepSpeedZeroOffloadParamConfig, deepspeed_keys.OffloadParam),
    (DeepSpeedZeroOffloadOptimizerConfig, deepspeed_keys.OffloadOptimizer),
    (DeepSpeedBF16Config, deepspeed_keys.Bf16),
    (DeepSpeedFP16Config, deepspeed_keys.Fp16),
    (CommsLoggerConfig, deepspeed_keys.CommsLogger),
    (DeepSpeedThroughputTimerConfig, deepspeed_keys.Throughput),
]


@pytest.mark.parametrize(("theirs", "ours"), MODELS, ids=[theirs.__name__ for theirs, _ in MODELS])
def test_a_model_accepts_the_same_values_as_deepspeed(theirs: type[Any], ours: type[ConfigModel]) -> None:
    tried = 0
    for key, annotation in ours.__annotations__.items():
        for right, wrong in [(right, wrong) for sample, right, wrong in SAMPLES if sample == annotation]:
            tried += 1
            for model in (theirs, ours):
                model(**{key: right})
                with pytest.raises(ValueError, match="validation error"):
                    model(**{key: wrong})
    assert tried


@pytest.mark.parametrize("model", [DeepSpeedZeroConfig, deepspeed_keys.Zero])
def test_an_empty_bucket_is_refused(model: type[Any]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        model(reduce_bucket_size=0)


def test_keys_inside_the_blocks_are_deepspeed_s() -> None:
    left_out = {
        DeepSpeedBF16Config: refused("bf16"),
        DeepSpeedFP16Config: refused("fp16"),
        DeepSpeedZeroOffloadOptimizerConfig: refused("zero_optimization.offload_optimizer"),
    }
    for theirs, ours in MODELS[1:]:
        assert theirs.model_fields.keys() == ours.model_fields.keys() | left_out.get(theirs, set()), theirs
    assert deepspeed_keys.Aio.model_fields.keys() == AIO_DEFAULT_DICT.keys()
    names = {
        value
        for name, value in vars(profiling_constants).items()
        if name.startswith("FLOPS_PROFILER_") and not name.endswith(("_DEFAULT", "_FORMAT"))
    }
    assert deepspeed_keys.FlopsProfiler.model_fields.keys() == names


def test_types_and_log_levels_are_deepspeed_s() -> None:
    for text in ("fp32", "bf16", "fp16"):
        deepspeed_keys.PassedOn(communication_data_type=text)
        assert deepspeed_config.get_communication_data_type({"communication_data_type": text}) is not None
    for level in log_levels:
        deepspeed_keys.PassedOn(log_level=level)
    with pytest.raises(ValueError, match="Invalid communication_data_type"):
        deepspeed_config.get_communication_data_type({"communication_data_type": "fp33"})


def test_every_phase_of_the_watchdog_has_a_limit() -> None:
    assert list(deepspeed_keys.Limits.model_fields) == list(WATCHDOG_S)


def test_attentions_are_those_of_transformers() -> None:
    theirs = {name for name in ALL_ATTENTION_FUNCTIONS if name.startswith("flash_attention")} | {"sdpa", "eager"}
    assert set(ATTENTIONS) == theirs


def top_level_keys() -> set[str]:
    """Every key that DeepSpeed's config module looks up in the document."""
    asked: set[str] = set()

    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

        def __copy__(self) -> "Recorder":
            return self

        def keys(self) -> Any:
            owner = self

            class Keys:
                def __contains__(self, key: object) -> bool:
                    return key in owner

            return Keys()

    DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, train_batch_size=1))
    return asked


ALIASES = {
    "vocabulary_size": "asked for a warning only",
    "max_grad_norm": "an optimizer's key",
}


def test_every_top_level_key_of_deepspeed_is_in_a_table() -> None:
    asked = top_level_keys()
    assert {"zero_optimization", "train_batch_size", "prescale_gradients", "wandb"} <= asked
    owned = {path.split(".")[0] for path in deepspeed_keys.RECIPE_OWNED}
    tables = [
        set(deepspeed_keys.PassedOn.model_fields),
        {path for path in deepspeed_refused.REFUSED if "." not in path},
        {path for path in deepspeed_keys.SECOND_NAMES if "." not in path},
        owned,
        set(deepspeed_keys.DERIVED),
        {"scheduler"},
        set(deepspeed_keys.OURS),
    ]
    ours: set[str] = set().union(*tables)
    assert sum(map(len, tables)) == len(ours)  # each key has one owner
    assert (asked | deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()) - ours - ALIASES.keys() == set()
    assert not ours & ALIASES.keys()
    assert not asked & set(deepspeed_keys.OURS)  # DeepSpeed ignores them
    assert deepspeed_keys.Document.model_fields.keys() == ours - deepspeed_refused.REFUSED.keys()


def test_every_passed_on_key_is_one_that_deepspeed_reads() -> None:
    source = Path(deepspeed_config.__file__).parent.parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in source.rglob("*.py") if "inference" not in path.parts)
    for key in deepspeed_keys.PassedOn.model_fields.keys() | {
        path for path in deepspeed_refused.REFUSED if "." not in path
    }:
        assert re.search(rf"[\"']{key}[\"']", text), key


@pytest.mark.parametrize("hidden_size", [128, 768, 1000, 3200])
def test_automatic_buckets_are_hugging_face_s(hidden_size: int, resolved: Callable[..., Resolved]) -> None:
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    document: dict[str, Any] = {"zero_optimization": {"stage": 3, **dict.fromkeys(keys, "auto")}}
    theirs = HfTrainerDeepSpeedConfig(json.loads(json.dumps(document)))
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
    theirs.trainer_config_finalize(SimpleNamespace(get_warmup_steps=lambda _: 0), model, 1)
    shape = target_shape(load_recipe("quickstart"))
    assert shape is not None
    wide = shape[0].model_copy(update={"hidden_size": hidden_size})
    ours = resolved({**document, "train_micro_batch_size_per_gpu": 1}, shape=(wide, 4)).config["zero_optimization"]
    assert {key: ours[key] for key in keys} == {key: theirs.get_value(f"zero_optimization.{key}") for key in keys}


def test_without_a_shape_automatic_buckets_are_deepspeed_s(resolved: Callable[..., Resolved]) -> None:
    document = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"reduce_bucket_size": "auto"}}
    found = resolved(document, shape=None)
    assert "reduce_bucket_size" not in found.config["zero_optimization"]
    assert "zero_optimization.reduce_bucket_size: DeepSpeed's own default (auto)" in found.notes


def accepted(config: dict[str, Any], world_size: int) -> DeepSpeedConfig:
    """Build DeepSpeed's config, which checks batch, types and unknown nested keys."""
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: world_size)
    parsed = DeepSpeedConfig(json.loads(json.dumps(config)), mpu=mpu)
    assert parsed.world_size == world_size
    return parsed


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give DeepSpeed's config a number of ranks without a process group."""
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_accepts_every_shipped_pair(path: Path, world_size: int, ranks: None) -> None:
    machine = MACHINES["cpu" if path.stem == "cpu" else "h100"]
    for name in shipped_names():
        recipe = load_recipe(name)
        found = resolve_for(recipe, read(path), path.name, world_size=world_size, machine=machine)
        parsed = accepted(dict(found.config), world_size)
        assert parsed.train_batch_size == recipe.training.batch_windows
        assert parsed.train_micro_batch_size_per_gpu == found.micro_batch_size
        assert parsed.gradient_accumulation_steps == found.gradient_accumulation_steps
        assert parsed.zero_optimization_stage == found.zero_stage >= 1
        assert parsed.bfloat16_config.enabled == (found.precision == "bf16")
        assert parsed.gradient_clipping == recipe.optimizer.max_grad_norm
        assert parsed.optimizer_params["lr"] == recipe.optimizer.lr
        assert parsed.grad_accum_dtype == "fp32"
        assert read(path)["kernels"] == found.config["kernels"]  # complete


def auto(*keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys, "auto")


# The examples of Hugging Face's documentation (transformers, docs/source/en/deepspeed.md).
SCALER = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
HUGGING_FACE = {
    "fp16": {"enabled": "auto", **SCALER},
    "optimizer": {"type": "AdamW", "params": auto("lr", "betas", "eps", "weight_decay")},
    "scheduler": {"type": "WarmupLR", "params": auto("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")},
    **auto("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"),
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
OFFLOAD = {"device": "cpu", "pin_memory": True}
COMMON = {"offload_optimizer": OFFLOAD, "overlap_comm": True, "contiguous_gradients": True}
HUGGING_FACE_ZERO_2 = {
    **HUGGING_FACE,
    "zero_optimization": {
        "stage": 2,
        **COMMON,
        **dict.fromkeys(("allgather_partitions", "reduce_scatter", "round_robin_gradients"), True),
        **dict.fromkeys(("allgather_bucket_size", "reduce_bucket_size"), 5e8),
    },
}
HUGGING_FACE_ZERO_3 = {
    **HUGGING_FACE,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        **COMMON,
        "offload_param": OFFLOAD,
        **auto("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        **dict.fromkeys(("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 1e9),
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("document", [HUGGING_FACE_ZERO_2, HUGGING_FACE_ZERO_3], ids=["zero2", "zero3"])
def test_a_config_of_hugging_face_s_documentation_works(
    document: dict[str, Any], world_size: int, ranks: None, resolved: Callable[..., Resolved]
) -> None:
    assert HfDeepSpeedConfig(document).is_zero3() == (document["zero_optimization"]["stage"] == 3)
    found = resolved(document, world_size=world_size)
    assert '"auto"' not in json.dumps({key: value for key, value in found.config.items() if key != "kernels"})
    parsed = accepted(dict(found.config), world_size)
    assert not parsed.zero_config.round_robin_gradients, "it mixes up master weights on several ranks"
    assert parsed.zero_optimization_stage == document["zero_optimization"]["stage"]
    assert parsed.zero_config.offload_optimizer.device == "cpu"
    assert parsed.scheduler_name is None
    assert found.precision == "bf16"
    kept = {**document["zero_optimization"]}
    kept.pop("round_robin_gradients", None)
    given = {key: value for key, value in kept.items() if value != "auto"}
    assert found.config["zero_optimization"].items() >= given.items()
