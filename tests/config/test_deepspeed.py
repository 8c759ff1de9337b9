import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from inheritune_ds.config.deepspeed import Machine, Resolved
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.model import Shape
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.memory import largest_micro_batch

CPU = Machine(kind="cpu", memory_gib=16.0, bf16=False)
CPU_BF16 = Machine(kind="cpu", memory_gib=16.0, bf16=True)
OLD_GPU = Machine(kind="cuda", memory_gib=16.0, bf16=False)
FLAT = {"train_micro_batch_size_per_gpu": 8}
Resolve = Callable[..., Resolved]


def refusal(resolved: Resolve, document: dict[str, Any], **options: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        resolved({**FLAT, **document}, **options)
    return caught.value


def test_numbers_of_the_recipe_are_filled_in(resolved: Resolve) -> None:
    config = resolved(FLAT).config
    assert config["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 4e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.2},
    }
    assert config["gradient_clipping"] == 0.5
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (32, 4)
    assert config["steps_per_print"] == 2**31 - 1
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert list(config) == sorted(config)


def test_every_auto_is_resolved_and_the_user_s_document_is_unchanged(resolved: Resolve) -> None:
    document: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": "auto"},
        "data_types": {"grad_accum_dtype": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "sub_group_size": "auto"},
    }
    before = copy.deepcopy(document)
    found = resolved(document)
    assert '"auto"' not in json.dumps({key: value for key, value in found.config.items() if key != "kernels"})
    assert document == before
    assert "scheduler" not in found.config
    assert found.config["fp16"] == {"enabled": False}
    assert [note.partition(":")[0] for note in found.notes] == [
        "scheduler",
        "bf16",
        "data_types.grad_accum_dtype",
        "zero_optimization.stage",
        "zero_optimization.reduce_bucket_size",
        "bf16.immediate_grad_update",
        "communication_data_type",
        "fp16.loss_scale",
        "zero_optimization.sub_group_size",
        "train_micro_batch_size_per_gpu",
    ]


@pytest.mark.parametrize(
    ("machine", "document", "precision", "note"),
    [
        (Machine("cuda", 48.0, bf16=True), {}, "bf16", "bf16: on (auto: bf16 is supported on this cuda)"),
        (OLD_GPU, {}, "fp32", "bf16: off (auto: bf16 is not supported at full speed on this cuda)"),
        (CPU, {}, "fp32", "bf16: off (auto: bf16 is not supported at full speed on this cpu)"),
        (CPU_BF16, {}, "bf16", "bf16: on (auto: bf16 is supported on this cpu)"),
        (CPU, {"bf16": {"enabled": True}}, "bf16", None),
        (CPU_BF16, {"bf16": {"enabled": False}}, "fp32", None),
        (OLD_GPU, {"fp16": {"enabled": True, "loss_scale": 0}, "bf16": {"enabled": False}}, "fp16", None),
        (CPU, {"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}, "fp32", None),
    ],
)
def test_auto_precision_depends_on_the_machine(
    machine: Machine, document: dict[str, Any], precision: str, note: str | None, resolved: Resolve
) -> None:
    found = resolved({**FLAT, **document}, machine=machine)
    assert found.precision == precision
    assert [line for line in found.notes if line.startswith("bf16:")] == ([note] if note else [])
    assert isinstance(found.config["bf16"]["enabled"], bool)
    assert isinstance(found.config["fp16"]["enabled"], bool)


ON = {"enabled": True}
BF16: dict[str, Any] = {**FLAT, "bf16": ON}


@pytest.mark.parametrize(
    ("changes", "ranks", "immediate", "sent"),
    [
        ({}, 1, True, "fp32"),
        ({}, 2, True, None),
        (
            {"bf16": {"enabled": True, "immediate_grad_update": False}, "communication_data_type": "bf16"},
            1,
            False,
            "bf16",
        ),
        ({"zero_optimization": {"stage": 2}}, 1, None, None),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 1, None, None),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, 1, None, None),
        ({"bf16": {"enabled": False}}, 1, None, None),
    ],
)
def test_bf16_gradients_are_freed_early_and_not_rounded_where_that_is_free(
    changes: dict[str, Any],
    ranks: int,
    immediate: bool | None,  # noqa: FBT001
    sent: str | None,
    resolved: Resolve,
) -> None:
    config = resolved({**BF16, **changes}, world_size=ranks).config
    assert config["bf16"].get("immediate_grad_update") is immediate
    assert config.get("communication_data_type") == sent


@pytest.mark.parametrize(("stage", "hidden", "bucket"), [(1, 64, 50_000_000), (2, 8192, 67_108_864), (3, 64, 4096)])
def test_zero_1_and_2_reduce_at_least_50_million_elements_at_once(
    stage: int, hidden: int, bucket: int, resolved: Resolve, wide: Shape
) -> None:
    zero = {"stage": stage, "reduce_bucket_size": "auto"}
    shape = (wide.model_copy(update={"hidden_size": hidden}), 1)
    config = resolved({**FLAT, "zero_optimization": zero}, shape=shape, machine=Machine("cuda", 1e4, bf16=True)).config
    assert config["zero_optimization"]["reduce_bucket_size"] == bucket


def test_fp16_disables_automatic_bf16_and_keeps_its_scaler(resolved: Resolve) -> None:
    scaler = {"loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2}
    found = resolved({**FLAT, "fp16": {"enabled": True, **scaler}})
    assert found.precision == "fp16"
    assert found.config["fp16"] == {"enabled": True, **scaler}


@pytest.mark.parametrize(("stage", "overlap"), [(1, False), (2, False), (3, True)])
def test_stages_are_kept_and_overlap_is_explicit(stage: int, overlap: bool, resolved: Resolve) -> None:  # noqa: FBT001
    found = resolved({**FLAT, "zero_optimization": {"stage": stage}})
    assert found.zero_stage == stage
    assert found.config["zero_optimization"]["overlap_comm"] is overlap
    chosen = resolved({**FLAT, "zero_optimization": {"stage": stage, "overlap_comm": not overlap}})
    assert chosen.config["zero_optimization"]["overlap_comm"] is not overlap


@pytest.mark.parametrize(
    ("zero", "offloads", "offloads_optimizer"),
    [
        ({"stage": 1}, False, False),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, True, True),
        ({"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}, True, False),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}, True, True),
        ({"stage": 1, "offload_param": {"device": "none"}, "offload_optimizer": None}, False, False),
    ],
)
def test_offloading_is_read_from_its_blocks(
    zero: dict[str, Any], *, offloads: bool, offloads_optimizer: bool, resolved: Resolve
) -> None:
    found = resolved({**FLAT, "zero_optimization": zero})
    assert (found.offloads, found.offloads_optimizer) == (offloads, offloads_optimizer)


def test_an_inert_scheduler_param_of_hugging_face_is_dropped(resolved: Resolve) -> None:
    names = ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
    params = {"last_batch_iteration": -1, **dict.fromkeys(names, "auto")}
    found = resolved({**FLAT, "scheduler": {"type": "WarmupDecayLR", "params": params}})
    assert "scheduler" not in found.config
    assert "scheduler: dropped, the recipe's schedule is used (schedule.* in the recipe)" in found.notes
    with pytest.raises(RecipeError, match="scheduler: last_batch_iteration is set here, but the recipe owns"):
        resolved({**FLAT, "scheduler": {"params": {**params, "last_batch_iteration": 0}}})


def test_null_is_removed(resolved: Resolve) -> None:
    blocks = dict.fromkeys(("aio", "bf16", "fp16", "data_types", "zero_optimization", "optimizer", "scheduler"))
    assert resolved({**FLAT, **blocks}).config == resolved(FLAT).config


def test_keys_of_the_machine_are_passed_on(resolved: Resolve) -> None:
    passed = {"wall_clock_breakdown": True, "steps_per_print": 10, "prescale_gradients": False}
    assert resolved({**FLAT, **passed}).config.items() >= passed.items()


@pytest.mark.parametrize("size", [True, "8", 8.0, -8, None])
def test_a_micro_batch_is_a_whole_number(size: Any, resolved: Resolve) -> None:
    found = refusal(resolved, {"train_micro_batch_size_per_gpu": size})
    assert found.problem == f"ds.json: train_micro_batch_size_per_gpu: {size!r} is not accepted"


def test_the_suggested_override_gives_the_requested_batch(resolved: Resolve) -> None:
    action = refusal(resolved, {"train_batch_size": 64}).action
    override = next(word for word in action.split() if "=" in word)
    recipe = load_recipe("quickstart", ["training.seq_len=128", override])
    assert resolved(FLAT, recipe=recipe).config["train_batch_size"] == 64


def test_fp16_is_refused_on_a_cpu(resolved: Resolve) -> None:
    error = refusal(resolved, {"fp16": {"enabled": True}}, machine=CPU)
    assert error.problem == "ds.json: fp16.enabled: half precision is not available on a CPU"
    assert error.allowed == "bf16, or neither (fp32)"


def test_all_problems_are_reported_at_once(resolved: Resolve) -> None:
    document = {
        "zero_optimisation": {},
        "gradient_clipping": 1.0,
        "scheduler": {"params": {"total_num_steps": 3}},
        "data_types": {"grad_accum_dtype": "int8"},
        "zero_optimization": {"stage": 7, "sub_group_sice": 1},
        "train_micro_batch_size_per_gpu": 3,
    }
    lines = str(refusal(resolved, document)).splitlines()
    keys = [line.split(": ")[1] for line in lines[1:] if not line.startswith("  ")]
    assert keys == [
        "data_types.grad_accum_dtype",
        "zero_optimization.stage",
        "zero_optimization.sub_group_sice",
        "zero_optimisation",
        "gradient_clipping",
        "scheduler",
        "train_micro_batch_size_per_gpu",
    ]


def test_disabled_blocks_of_other_tools_are_dropped_with_a_note(resolved: Resolve) -> None:
    document = {"wandb": {"enabled": False, "project": "x"}, "activation_checkpointing": {"enabled": False}}
    found = resolved({**FLAT, **document})
    assert not found.config.keys() & document.keys()
    assert [note for note in found.notes if "dropped" in note] == [
        "wandb: dropped, it changes nothing",
        "activation_checkpointing: dropped, it changes nothing",
    ]


@pytest.mark.parametrize(
    ("world_size", "given", "allowed"), [(1, 12, "1, 2, 4, 8, 16, 32"), (4, 16, "1, 2, 4, 8"), (8, 3, "1, 2, 4")]
)
def test_a_micro_batch_must_divide_a_rank_s_windows(
    world_size: int, given: int, allowed: str, resolved: Resolve
) -> None:
    error = refusal(resolved, {"train_micro_batch_size_per_gpu": given}, world_size=world_size)
    assert error.allowed == allowed
    for size in map(int, allowed.split(", ")):
        config = resolved({"train_micro_batch_size_per_gpu": size}, world_size=world_size).config
        assert config["gradient_accumulation_steps"] * size * world_size == 32


def test_ranks_must_share_the_batch_evenly(resolved: Resolve) -> None:
    error = refusal(resolved, {}, world_size=3)
    assert error.problem == (
        "training.global_batch_tokens 4096 is 32 windows of 128 tokens, which 3 ranks cannot share evenly"
    )
    assert error.allowed == "a multiple of 384 tokens"
    assert error.action == "write training.global_batch_tokens=4224 on the command line, or use another number of ranks"


@pytest.mark.parametrize("memory_gib", [4.0, 8.0, 48.0])
@pytest.mark.parametrize("stage", [1, 3])
def test_an_automatic_micro_batch_is_the_largest_that_fits(
    memory_gib: float, stage: int, resolved: Resolve, wide: Shape
) -> None:
    long = load_recipe("quickstart", ["training.seq_len=1024", "training.global_batch_tokens=65_536"])
    machine = Machine("cuda", memory_gib, bf16=True)
    options: dict[str, Any] = {"recipe": long, "machine": machine, "world_size": 2}
    document = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "bf16"}}
    found = resolved(document, **options)
    expected = largest_micro_batch(
        wide,
        4,
        memory_gib=memory_gib,
        batch_windows=64,
        seq_len=1024,
        zero_stage=stage,
        world_size=2,
        precision="bf16",
        accumulate_fp32=False,
        offload_optimizer=False,
        offload_parameters=False,
    )
    assert found.micro_batch_size == expected
    assert found.gradient_accumulation_steps == 32 // expected
    assert (
        f"train_micro_batch_size_per_gpu: {expected} (auto: the largest that {memory_gib:.0f} GiB hold)" in found.notes
    )


@pytest.mark.parametrize("model", ["EleutherAI/pythia-160m", "./pythia"])
def test_an_automatic_micro_batch_needs_the_shape(model: str, resolved: Resolve) -> None:
    of_unknown_shape = load_recipe("quickstart", [f"reference.model={model}"])
    error = refusal(resolved, {"train_micro_batch_size_per_gpu": "auto"}, shape=None, recipe=of_unknown_shape)
    assert f"auto needs the shape of the model, which is unknown for {model}" in error.problem
    assert error.allowed.startswith("reference.shape in the recipe")
    assert error.action == 'write "train_micro_batch_size_per_gpu": 8, or another number of sequences that fits'
    assert resolved(FLAT, shape=None).micro_batch_size == 8


def test_a_model_that_does_not_fit_is_refused(resolved: Resolve) -> None:
    error = refusal(resolved, {"train_micro_batch_size_per_gpu": "auto"}, machine=Machine("cuda", 0.25, bf16=True))
    assert error.exit_code == 3
    assert "0.2" in error.problem


AUTO_KERNELS: dict[str, Any] = dict.fromkeys(("attention", "optimizer", "liger", "loss", "compile"), "auto")
AUTO_KERNELS |= {"activation_checkpointing": "none", "deterministic": False}


@pytest.mark.parametrize("given", [{}, {"kernels": None}, {"kernels": {}}, {"kernels": {"liger": "auto"}}])
def test_all_kernels_are_written_and_keep_auto(given: dict[str, Any], resolved: Resolve) -> None:
    found = resolved({**FLAT, **given})
    assert found.config["kernels"] == AUTO_KERNELS
    assert found.kernels == KernelRequest()
    assert not [note for note in found.notes if note.startswith("kernels")]


def test_named_kernels_reach_the_request(resolved: Resolve) -> None:
    named = {
        "attention": "flash_attention_3",
        "optimizer": "apex",
        "liger": False,
        "loss": "liger",
        "compile": True,
        "activation_checkpointing": "selective",
        "deterministic": True,
    }
    found = resolved({**FLAT, "kernels": named})
    assert found.config["kernels"] == named
    assert found.kernels.model_dump() == named
    note = "kernels.deterministic: on (the same bits in every run on the same GPUs, at less speed)"
    assert [line for line in found.notes if line.startswith("kernels")] == [note]
    with pytest.raises(ValidationError, match="frozen"):
        found.kernels.compile = False


def test_automatic_checkpointing_of_activations_is_none(resolved: Resolve) -> None:
    found = resolved({**FLAT, "kernels": {"activation_checkpointing": "auto"}})
    assert found.kernels.activation_checkpointing == "none"
    assert "kernels.activation_checkpointing: none (auto: it costs a second forward pass)" in found.notes


def test_torch_adam_of_the_optimizer_block_names_torch_s(resolved: Resolve) -> None:
    found = resolved({**FLAT, **TORCH_ADAM})
    assert found.kernels.optimizer == "torch_fused"
    assert "kernels.optimizer: torch_fused (optimizer.params.torch_adam selects torch's)" in found.notes
    assert resolved({**FLAT, **TORCH_ADAM, "kernels": {"optimizer": "torch"}}).kernels.optimizer == "torch"
    assert resolved({**FLAT, **TORCH_ADAM, **OFFLOADED}).kernels.optimizer == "auto"


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
BREAKS = "true does not work with stage 3: its hooks gather parameters inside the block and break the graph"
CPU_ADAM = "torch does not work with offload_optimizer: only DeepSpeed's CPU Adam updates a state on the host"
TWO_OWNERS = "apex contradicts optimizer.params.torch_adam, which selects torch's"
AUTO = 'write "auto"'
REMOVE_OFFLOAD = f"{AUTO}, or remove zero_optimization.offload_optimizer"
STAGE_2 = "set zero_optimization.stage to 2"
REMOVE_TORCH_ADAM = "remove optimizer.params.torch_adam"
NO_CPU_KERNEL = "flash_attention_2 has no kernel for a CPU"
HALF = "computes in half precision, this run in fp32"
TORCH_ADAM = {"optimizer": {"params": {"torch_adam": True}}}
REFUSALS: list[tuple[Machine, dict[str, Any], str, str]] = [
    (CPU, {"kernels": {"attention": "flash_attention_2"}}, f"attention: {NO_CPU_KERNEL}", AUTO),
    (OLD_GPU, {"kernels": {"attention": "flash_attention_4"}}, f"attention: flash_attention_4 {HALF}", AUTO),
    (
        CPU,
        {"kernels": {"compile": True}, "zero_optimization": {"stage": 3}},
        f"compile: {BREAKS}",
        f"{AUTO}, or {STAGE_2}",
    ),
    (CPU, {"kernels": {"optimizer": "torch"}, **OFFLOADED}, f"optimizer: {CPU_ADAM}", REMOVE_OFFLOAD),
    (OLD_GPU, {"kernels": {"optimizer": "apex"}, **TORCH_ADAM}, f"optimizer: {TWO_OWNERS}", REMOVE_TORCH_ADAM),
]


@pytest.mark.parametrize(("machine", "document", "problem", "action"), REFUSALS)
def test_kernels_that_contradict_another_key_are_refused(
    machine: Machine, document: dict[str, Any], problem: str, action: str, resolved: Resolve
) -> None:
    with pytest.raises(RecipeError) as caught:
        resolved({**FLAT, **document}, machine=machine)
    assert (caught.value.problem, caught.value.action) == (f"ds.json: kernels.{problem}", action)
    assert caught.value.allowed
