"""Follows the `do:` line of each message literally, and compares the result with what the user asked for."""

import copy
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from inheritune_ds.config.deepspeed import Machine, Resolved
from inheritune_ds.config.deepspeed_keys import SECOND_NAMES
from inheritune_ds.config.deepspeed_refused import INSTEAD, REFUSED, changes_nothing
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.checks import check_lengths

Resolve = Callable[..., Resolved]
FLAT = {"train_micro_batch_size_per_gpu": 8}
A6000 = Machine(kind="cuda", memory_gib=48.0, bf16=True)
CPU = Machine(kind="cpu", memory_gib=16.0, bf16=False)
SMALL = ["training.seq_len=128", "training.global_batch_tokens=4096"]
MOST = 4
"""Messages that a document may need, one after the other."""


@dataclass
class Asked:
    """A DeepSpeed config and the overrides of a recipe, as the user follows the advice."""

    document: dict[str, Any]
    overrides: list[str]

    def place(self, path: str) -> tuple[dict[str, Any], str]:
        *parents, last = path.split(".")
        node = self.document
        for part in parents:
            node = node.setdefault(part, {})
        return node, last

    def write(self, path: str, value: Any) -> None:
        node, last = self.place(path)
        old = node.get(last)
        node[last] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value

    def remove(self, path: str) -> Any:
        node, last = self.place(path)
        return node.pop(last)

    def follow(self, error: RecipeError) -> None:
        """Do what the first alternative of each action says, to the letter."""
        for text in re.split(r"^\d+\. ", str(error), flags=re.MULTILINE):
            if match := re.search(r"  do: (.*)", text):
                path = re.match(r"(?:ds\.json|quickstart): ([\w.]+)", text)
                self.act(path[1] if path else "", match[1])

    def act(self, path: str, action: str) -> None:
        if match := re.search(r"write ((?:'[^']+' ?|[\w.]+=\S+ ?)+) ?on the command line", action):
            self.overrides += shlex.split(match[1])
        if match := re.search(r"\b(?:here )?and ('[^']+'|[\w.]+=\S+) on the command line", action):
            self.overrides += shlex.split(match[1])
        if match := re.match(r"remove ([\w.]+)", action):
            self.remove(match[1])
        elif match := re.fullmatch(r"did you mean ([\w.]+)\?", action):
            self.write(match[1], self.remove(path))
        elif match := re.match(r'replace it by "(\w+)": (\{.*?\}|"auto")', action):
            self.remove(path)
            self.write(".".join([*path.split(".")[:-1], match[1]]), json.loads(match[2]))
        elif match := re.match(r"set ([\w.]+) to (\d+)", action):
            self.write(match[1], json.loads(match[2]))
        elif match := re.match(r'write (".*?"|\{.*?\}|true|false|[-\d.e+]+)(?= |,|;|$)', action):
            self.write(path, json.loads(match[1]))
        else:
            assert " on the command line" in action, f"no value to write: {action}"

    def settle(self, resolved: Resolve, **how: Any) -> tuple[Resolved, Recipe]:
        """Follow one message after the other until the config is accepted."""
        for _ in range(MOST):
            recipe = load_recipe("quickstart", [*SMALL, *self.overrides])
            try:
                return resolved(copy.deepcopy(self.document), recipe=recipe, **how), recipe
            except RecipeError as error:
                self.follow(error)
        raise AssertionError("the advice leads nowhere")


def settled(resolved: Resolve, document: dict[str, Any], **how: Any) -> tuple[Resolved, Recipe]:
    return Asked({**FLAT, **copy.deepcopy(document)}, []).settle(resolved, **how)


def zero(stage: Any = 3, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def at(path: str) -> Callable[[Resolved, Recipe], Any]:
    """The value of a key path in the resolved config."""

    def read(found: Resolved, _: Recipe) -> Any:
        node: Any = found.config
        for part in path.split("."):
            node = node[part]
        return node

    return read


def steps(found: Resolved, _: Recipe) -> Any:
    return found.config["train_batch_size"]


ZERO_PARAM, ZERO_OPTIMIZER = "zero_optimization.offload_param.device", "zero_optimization.offload_optimizer.device"


def schedule(_: Resolved, recipe: Recipe) -> tuple[Any, ...]:
    kind = recipe.schedule
    return kind.kind, kind.warmup_steps, recipe.optimizer.lr, str(recipe.training.duration)


WARMUP = {"warmup_num_steps": 100, "warmup_max_lr": 3e-4}
SEPARATE = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 16}
INTENTS: list[tuple[dict[str, Any], dict[str, Any], Callable[[Resolved, Recipe], Any], Any]] = [
    (zero(2, cpu_offload=True), {}, lambda found, _: (found.zero_stage, found.offloads_optimizer), (2, True)),
    (zero(3, cpu_offload=True, cpu_offload_use_pin_memory=True), {}, at(ZERO_OPTIMIZER), "cpu"),
    (zero(3, cpu_offload_param=True), {}, at(ZERO_PARAM), "cpu"),
    (zero(2, offload_param={"device": "cpu"}), {}, at(ZERO_PARAM), "cpu"),
    (zero(3, offload_param={"device": "nvme", "nvme_path": "/x"}), {}, at(ZERO_PARAM), "cpu"),
    (zero(1, offload_optimizer={"device": "nvme"}), {}, at(ZERO_OPTIMIZER), "cpu"),
    (zero(2, offload_optimizer={"device": "CPU"}), {}, at(ZERO_OPTIMIZER), "cpu"),
    (zero(2, offload_optimizer="cpu"), {}, at(ZERO_OPTIMIZER), "cpu"),
    *((zero(stage), {}, lambda found, _: found.zero_stage, int(stage)) for stage in ("1", "2", "3", 2.0, 3.0)),
    (zero(0), {}, lambda found, _: found.zero_stage, 1),
    (zero(2, overlap_comm="true"), {}, at("zero_optimization.overlap_comm"), True),
    (zero(3, overlap_comm=0), {}, at("zero_optimization.overlap_comm"), False),
    (zero(2, contiguous_gradients="False"), {}, at("zero_optimization.contiguous_gradients"), False),
    (zero(2, reduce_bucket_size="5e7"), {}, at("zero_optimization.reduce_bucket_size"), 5e7),
    (zero(3, stage3_max_live_parameters="1000"), {}, at("zero_optimization.stage3_max_live_parameters"), 1000),
    (zero(3, max_reuse_distance="10"), {}, at("zero_optimization.stage3_max_reuse_distance"), 10),
    (zero(2, stage2_max_live=3), {}, lambda found, _: found.zero_stage, 2),
    ({"bf16": True}, {}, lambda found, _: found.precision, "bf16"),
    ({"fp16": True}, {}, lambda found, _: found.precision, "fp16"),
    ({"bf16": {"enabled": "True"}}, {}, lambda found, _: found.precision, "bf16"),
    ({"fp16": {"enabled": 1, "initial_scale_power": "12"}}, {}, at("fp16.initial_scale_power"), 12),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, lambda found, _: found.precision, "bf16"),
    ({"fp16": {"enabled": True}}, {"machine": CPU}, lambda found, _: found.precision, "fp32"),
    ({"amp": {"enabled": True, "opt_level": "O1"}}, {}, lambda found, _: found.precision, "bf16"),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}, lambda found, _: found.precision, "bf16"),
    ({"communication_data_type": "FP32"}, {}, at("communication_data_type"), "fp32"),
    ({"activation_checkpointing": {"partition_activations": True}}, {}, at("kernels.activation_checkpointing"), "full"),
    ({"compile": {"deepcompile": True}}, {}, at("kernels.compile"), True),
    ({"kernels": {"attention": "SDPA"}}, {}, at("kernels.attention"), "sdpa"),
    ({"kernels": {"compile": "on"}}, {}, at("kernels.compile"), True),
    (
        {"kernels": {"optimizer": "apex"}, "optimizer": {"params": {"torch_adam": True}}},
        {},
        at("kernels.optimizer"),
        "apex",
    ),
    (
        {"kernels": {"optimizer": "torch"}, **zero(2, offload_optimizer={"device": "cpu"})},
        {},
        at(ZERO_OPTIMIZER),
        "cpu",
    ),
    ({"kernels": {"compile": True}, **zero(3)}, {}, lambda found, _: found.zero_stage, 3),
    ({"kernels": {"attention": "flash_attention_2"}, **zero(2)}, {"machine": CPU}, at("kernels.attention"), "auto"),
    ({"optimizer": {"type": "adamw"}}, {}, at("optimizer.type"), "AdamW"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 2e-4}}}, {}, at("optimizer.params.lr"), 2e-4),
    ({"optimizer": {"params": {"betas": [0.9, 0.98]}}}, {}, at("optimizer.params.betas"), [0.9, 0.98]),
    ({"optimizer": {"params": {"lr": "5e-5", "eps": 1e-6}}}, {}, at("optimizer.params.lr"), 5e-5),
    ({"optimizer": {"params": {"weight_decay": 0}}}, {}, at("optimizer.params.weight_decay"), 0),
    ({"gradient_clipping": 0.25}, {}, at("gradient_clipping"), 0.25),
    ({"gradient_clipping": 0}, {}, at("gradient_clipping"), 0),
    ({"train_batch_size": 64}, {}, steps, 64),
    (SEPARATE, {}, steps, 64),
    (SEPARATE, {"world_size": 2}, steps, 128),
    ({**SEPARATE, "train_batch_size": 64}, {}, steps, 64),
    ({"train_micro_batch_size_per_gpu": 5}, {}, lambda found, _: found.micro_batch_size, 4),
    ({"train_micro_batch_size_per_gpu": "16"}, {}, lambda found, _: found.micro_batch_size, 16),
    ({"train_micro_batch_size_per_gpu": 1}, {"world_size": 3}, steps, 33),
    ({"scheduler": {"type": "WarmupLR", "params": WARMUP}}, {}, schedule, ("constant", 100, 3e-4, "240 steps")),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": 2000}}},
        {},
        schedule,
        ("wsd", 100, 3e-4, "2000 steps"),
    ),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": {**WARMUP, "total_num_steps": 190}}},
        {},
        schedule,
        ("cosine", 100, 3e-4, "190 steps"),
    ),
    ({"bfloat16": {"enabled": False}, "bf16": {"enabled": True}}, {}, lambda found, _: found.precision, "bf16"),
    (
        zero(3, max_live_parameters=7, stage3_max_live_parameters=9),
        {},
        at("zero_optimization.stage3_max_live_parameters"),
        9,
    ),
]


@pytest.mark.parametrize(("document", "how", "read", "meant"), INTENTS, ids=[str(case[0])[:70] for case in INTENTS])
def test_following_the_advice_gives_what_was_asked_for(
    document: dict[str, Any],
    how: dict[str, Any],
    read: Callable[[Resolved, Recipe], Any],
    meant: Any,
    resolved: Resolve,
) -> None:
    assert read(*settled(resolved, document, **{"machine": A6000, **how})) == meant


ON = {"compile": {"deepcompile": True}, "tensor_parallel": {"autotp_size": 2}, "expert_parallel": {"autoep_size": 2}}
ON_VALUES = {
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": False,
    "optimizer.params.bias_correction": False,
    "optimizer.params.fp32_optimizer_states": False,
    "optimizer.params.max_grad_norm": 1.0,
    "seq_parallel_communication_data_type": "bf16",
    "sequence_parallel_size": 2,
    "zero_optimization.compute_grad_norm": False,
    "zero_optimization.mics_shard_size": 8,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": 0.5,
    "zero_optimization.override_module_apply": False,
    "zero_optimization.zero_hpz_partition_size": 8,
}
WITHOUT_EFFECT = {"zero_optimization.cpu_offload_use_pin_memory", "zero_optimization.load_from_fp32_weights"}


@pytest.mark.parametrize("path", sorted(REFUSED.keys() - WITHOUT_EFFECT))
def test_a_refused_key_is_named_not_supported_and_its_advice_leads_on(path: str, resolved: Resolve) -> None:
    asked = Asked(dict(FLAT), [])
    asked.write("zero_optimization.stage", 3)
    asked.write(path, ON.get(path, ON_VALUES.get(path, True)))
    with pytest.raises(RecipeError) as caught:
        resolved(copy.deepcopy(asked.document))
    assert caught.value.problem == f"ds.json: {path}: not usable here: {REFUSED[path]}"
    assert caught.value.action == INSTEAD.get(path, f"remove {path}")  # no other feature is suggested
    found, _ = asked.settle(resolved)
    assert found.zero_stage == 3


OFF: list[dict[str, Any]] = [
    zero(3, zero_quantized_weights=False, zero_quantized_gradients=False, zero_hpz_partition_size=1),
    zero(2, cpu_offload=False, cpu_offload_param=False, cpu_offload_use_pin_memory=True),
    zero(3, offload_optimizer={"device": "cpu", "super_offload": False, "cpuadam_cores_perc": 0.8}),
    zero(3, mics_shard_size=-1, mics_hierarchical_params_gather=False, elastic_checkpoint=False, zenflow=None),
    {"amp": {"enabled": "auto", "opt_level": "auto"}},
    {"amp": {"enabled": False, "opt_level": "O1"}},
    {"checkpoint": {"load_universal": False, "use_node_local_storage": False, "tag_validation": "Warn"}},
    {"compile": {"deepcompile": False, "offload_activation": True, "free_activation_threshold": 5}},
    {"compile": {}},
    {"tensor_parallel": {"autotp_size": 1, "tp_overlap_comm": True}},
    {
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "number_checkpoints": None,
        }
    },
    {"sequence_parallel_size": 1, "gradient_allreduce_op": "mean", "sparse_gradients": False},
    {"dataloader_drop_last": False, "progressive_layer_drop": {"enabled": False, "theta": 0.5}},
    {"elasticity": {"enabled": False}, "autotuning": {"enabled": False}, "hybrid_engine": None, "pipeline": {}},
    {"comms_config": {"prof_all": True}, "monitor_config": {"enabled": True}},
    {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": False},
        "fp16": {"fp16_master_weights_and_grads": False},
    },
    {
        "optimizer": {
            "legacy_fusion": False,
            "params": {"torch_adam": False, "adam_w_mode": True, "bias_correction": True},
        }
    },
    {"data_types": {"param_dtype": None, "buffer_dtype": None, "keep_in_fp32_modules": "auto"}},
]


@pytest.mark.parametrize("document", OFF, ids=[str(case)[:70] for case in OFF])
def test_a_switch_that_is_off_is_dropped_with_a_note(document: dict[str, Any], resolved: Resolve) -> None:
    found = resolved({**FLAT, **copy.deepcopy(document)})
    dropped = [note.split(":")[0] for note in found.notes if "dropped, " in note]
    assert dropped
    for path in dropped:
        node: Any = found.config
        for part in path.split("."):
            node = node.get(part, {})
        assert not node


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("zero_optimization.compute_grad_norm", False),
        ("zero_optimization.zero_hpz_partition_size", True),
        ("sequence_parallel_size", True),
        ("tensorboard", {"output_path": "logs"}),
        ("compile", {"deepcompile": True}),
        ("amp", {"enabled": True}),
        ("gradient_allreduce_op", "sum"),
        ("checkpoint", {"load_universal": True}),
    ],
)
def test_a_value_with_an_effect_is_not_dropped(path: str, value: Any) -> None:
    assert not changes_nothing(path, value)


@pytest.mark.parametrize(("path", "first"), SECOND_NAMES.items())
def test_both_names_of_a_key_mean_the_same(path: str, first: str, resolved: Resolve) -> None:
    value: Any = {"enabled": True} if first == "bf16" else True if "gather" in path or "all_reduce" in path else 12345
    configs = []
    for name in (path, ".".join([*path.split(".")[:-1], first])):
        asked = Asked(dict(FLAT), [])
        asked.write("zero_optimization.stage", 3)
        asked.write(name, value)
        configs.append(dict(resolved(asked.document).config))
    assert configs[0] == configs[1]
    assert f'"{path.rpartition(".")[2]}"' not in json.dumps(configs[0])


RECIPE: list[tuple[list[str], Callable[[Recipe], Any], Any]] = [
    (["training.seq_len='64'"], lambda recipe: recipe.training.seq_len, 64),
    (["training.seq_len=64.0"], lambda recipe: recipe.training.seq_len, 64),
    (["training.seqlen=64"], lambda recipe: recipe.training.seq_len, 64),
    (["optimizer.lr='3e-4'"], lambda recipe: recipe.optimizer.lr, 3e-4),
    (["optimizer.weight_decy=0.3"], lambda recipe: recipe.optimizer.weight_decay, 0.3),
    (["schedule.kind=Constant"], lambda recipe: recipe.schedule.kind, "constant"),
    (["faults.spikes=SKIP"], lambda recipe: recipe.faults.spikes, "skip"),
    (["export.dtype=BFloat16"], lambda recipe: recipe.export.dtype, "bfloat16"),
    (["seed='7'"], lambda recipe: recipe.seed, 7),
    (["target.width=Half"], lambda recipe: recipe.target.width, "half"),
]


@pytest.mark.parametrize(("overrides", "read", "meant"), RECIPE, ids=[case[0][0] for case in RECIPE])
def test_following_the_advice_of_a_recipe_gives_what_was_asked_for(
    overrides: list[str], read: Callable[[Recipe], Any], meant: Any
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", overrides)
    key, _, value = overrides[0].partition("=")
    asked = Asked({}, [])
    asked.write(key, value)
    asked.follow(caught.value)
    ((section, keys),) = asked.document.items() if "." in key else ((None, asked.document),)
    given = [f"{section}.{name}={value}" if section else f"{name}={value}" for name, value in keys.items()]
    assert read(load_recipe("quickstart", given)) == meant


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.warmup_steps=500", "training.duration=100 steps"],
        ["schedule.warmup_steps=100", "training.duration=100 steps"],
        ["schedule.warmup_steps=5", "training.duration=5 steps", "schedule.kind=wsd"],
        ["validation.max_tokens=5"],
        ["validation.max_tokens=129"],
    ],
)
def test_following_the_advice_on_lengths_gives_a_recipe_that_runs(overrides: list[str]) -> None:
    total = 5 if "training.duration=5 steps" in overrides else 100
    with pytest.raises(RecipeError) as caught:
        check_lengths(load_recipe("quickstart", overrides), total)
    match = re.search(r"set ([\w.]+=\d+)", caught.value.action)
    assert match is not None
    check_lengths(load_recipe("quickstart", [*overrides, match[1]]), total)
