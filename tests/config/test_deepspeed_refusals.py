from collections.abc import Callable
from typing import Any

import pytest

from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.deepspeed_refused import REFUSED
from inheritune_ds.errors import RecipeError

FLAT = {"train_micro_batch_size_per_gpu": 8}
Resolve = Callable[..., Resolved]


def refusal(resolved: Resolve, document: dict[str, Any]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        resolved({**FLAT, **document})
    return caught.value


FORMULA = "training.global_batch_tokens / (micro-batch x seq_len x ranks)"
NVME = "(DeepSpeed does not restore a state on NVMe exactly: a resumed run would differ)"
STAGE_0 = "(stage 0 loses precision in bf16 and has no gradient norm)"
STAGE_3 = "zero_optimization.offload_param.device: 'cpu' needs stage 3: DeepSpeed ignores it with stage"
OWNED, SCHEDULE = "is set here, but the recipe owns it as", "is set here, but the recipe owns the schedule"
WARMUP = {"warmup_num_steps": 10, "warmup_max_lr": "auto"}
TO_CPU = {"device": "cpu"}
MASTERS = "bf16.bf16_master_weights_and_grads"


def zero_3(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: unknown key"),
    ({"amp": {"enabled": True}}, "amp: not usable here: it needs NVIDIA's apex and excludes ZeRO; use bf16"),
    ({"gradient_allreduce_op": "sum"}, f"gradient_allreduce_op: not usable here: {REFUSED['gradient_allreduce_op']}"),
    ({"gradient_clipping": 0.25}, f"gradient_clipping: 0.25 {OWNED} optimizer.max_grad_norm"),
    ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, f"optimizer.params.betas: [0.9, 0.99] {OWNED} optimizer.betas"),
    ({"gradient_accumulation_steps": 4}, f"gradient_accumulation_steps: 4 is set here, but it is derived: {FORMULA}"),
    ({"optimizer": {"type": "Lion"}}, "optimizer.type: 'Lion' is not accepted"),
    ({"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad: not usable here: the optimizer is AdamW"),
    ({"optimizer": {"params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode: False is not accepted"),
    ({"optimizer": {"params": {"torch_adam": 1}}}, "optimizer.params.torch_adam: 1 is not accepted"),
    ({"optimizer": {"params": [1]}}, "optimizer.params: [1] is not accepted"),
    ({"optimizer": "AdamW"}, "optimizer: 'AdamW' is not accepted"),
    ({"scheduler": {"type": "WarmupLR", "params": WARMUP}}, f"scheduler: warmup_num_steps {SCHEDULE}"),
    ({"scheduler": "WarmupLR"}, f"scheduler: it {SCHEDULE}"),
    ({"scheduler": {"params": [3]}}, f"scheduler: it {SCHEDULE}"),
    ({"bf16": True}, "bf16: True is not accepted"),
    ({"bf16": {"enabled": "yes"}}, "bf16.enabled: 'yes' is not accepted"),
    ({"fp16": {"enabled": 1}}, "fp16.enabled: 1 is not accepted"),
    ({"bf16": {"enable": True}}, "bf16.enable: unknown key"),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, f"{MASTERS}: not usable here: {REFUSED[MASTERS]}"),
    ({"reliability": {"watchdog_s": {"step": 1e10}}}, "reliability.watchdog_s.step: 10000000000.0 is not accepted"),
    ({"data_types": {"grad_dtype": "bf16"}}, "data_types.grad_dtype: unknown key"),
    ({"data_types": {"grad_accum_dtype": "f32"}}, "data_types.grad_accum_dtype: 'f32' is not accepted"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled: bf16 and fp16 are both true"),
    ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag: unknown key"),
    ({"zero_optimization": [2]}, "zero_optimization: [2] is not accepted"),
    ({"zero_optimization": {"stage": 0}}, f"zero_optimization.stage: 0 is not accepted {STAGE_0}"),
    ({"zero_optimization": {"overlap_comm": "yes"}}, "zero_optimization.overlap_comm: 'yes' is not accepted"),
    (zero_3(reduce_bucket_size="5e8"), "zero_optimization.reduce_bucket_size: '5e8' is not accepted"),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer: 'cpu' is not accepted"),
    ({"scheduler": {"kind": "WarmupLR"}}, "scheduler: kind is set here, but the recipe owns the schedule"),
    ({"steps_per_print": "often"}, "steps_per_print: 'often' is not accepted"),
    ({"prescale_gradients": "yes"}, "prescale_gradients: 'yes' is not accepted"),
    ({"communication_data_type": "fp33"}, "communication_data_type: 'fp33' is not accepted"),
    ({"log_level": "loud"}, "log_level: 'loud' is not accepted"),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor: 0 is not accepted"),
    ({"fp16": {"enabled": True, "loss_scale": "big"}}, "fp16.loss_scale: 'big' is not accepted"),
    ({"aio": {"blocksize": 1}}, "aio.blocksize: unknown key"),
    ({"flops_profiler": {"enable": True}}, "flops_profiler.enable: unknown key"),
    ({"comms_logger": {"prof_ops": "all"}}, "comms_logger.prof_ops: 'all' is not accepted"),
    ({"timers": {"throughput": {"on": True}}}, "timers.throughput.on: unknown key"),
    ({"timers": {"throughput": 1}}, "timers.throughput: 1 is not accepted"),
    ({"optimizer": {"parms": {}}}, "optimizer.parms: unknown key"),
    (zero_3(offload_param={"devic": "cpu"}), "zero_optimization.offload_param.devic: unknown key"),
    (zero_3(offload_param={"device": "gpu"}), "zero_optimization.offload_param.device: 'gpu' is not accepted"),
    (
        zero_3(offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
        f"zero_optimization.offload_optimizer.device: 'nvme' is not accepted {NVME}",
    ),
    ({"zero_optimization": {"offload_param": TO_CPU}}, f"{STAGE_3} 1"),
    ({"zero_optimization": {"stage": 2, "offload_param": TO_CPU}}, f"{STAGE_3} 2"),
    (
        zero_3(offload_optimizer={**TO_CPU, "ratio": 0.5}),
        "zero_optimization.offload_optimizer.ratio: 0.5 is not accepted",
    ),
    ({"kernels": "fast"}, "kernels: 'fast' is not accepted"),
    ({"kernels": {"atention": "sdpa"}}, "kernels.atention: unknown key"),
    ({"kernels": {"attention": "flash_attention_5"}}, "kernels.attention: 'flash_attention_5' is not accepted"),
    ({"kernels": {"optimizer": "deepspeed_cpu"}}, "kernels.optimizer: 'deepspeed_cpu' is not accepted"),
    ({"kernels": {"liger": "yes"}}, "kernels.liger: 'yes' is not accepted"),
    ({"kernels": {"loss": True}}, "kernels.loss: True is not accepted"),
    ({"kernels": {"compile": 1}}, "kernels.compile: 1 is not accepted"),
    ({"kernels": {"activation_checkpointing": "all"}}, "kernels.activation_checkpointing: 'all' is not accepted"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu: 0 is not accepted"),
    (
        {"train_micro_batch_size_per_gpu": 5},
        "train_micro_batch_size_per_gpu: 5 does not divide the 32 windows of a step on each of 1 ranks",
    ),
]


@pytest.mark.parametrize(("document", "problem"), REFUSALS, ids=[problem[:50] for _, problem in REFUSALS])
def test_an_invalid_config_is_refused_with_key_and_value(
    document: dict[str, Any], problem: str, resolved: Resolve
) -> None:
    error = refusal(resolved, document)
    assert error.problem == f"ds.json: {problem}"
    assert error.exit_code == 3
    assert error.allowed
    assert error.action


@pytest.mark.parametrize(
    ("stage", "action"),
    [
        (True, "change zero_optimization.stage"),
        (1.0, "write 1"),
        ("1", "write 1 without quotes"),
        (4, "change zero_optimization.stage"),
        (-1, "change zero_optimization.stage"),
        ([1], "change zero_optimization.stage"),
        (None, "remove zero_optimization.stage"),
    ],
)
def test_stage_is_1_2_or_3(stage: Any, action: str, resolved: Resolve) -> None:
    error = refusal(resolved, {"zero_optimization": {"stage": stage}})
    assert error.problem.startswith(f"ds.json: zero_optimization.stage: {stage!r} is not accepted")
    assert error.allowed == '1, 2 or 3, or "auto"'
    assert error.action == action


@pytest.mark.parametrize("value", [-1, 1.5, True, None, [1]])
def test_a_bucket_size_is_a_count(value: Any, resolved: Resolve) -> None:
    error = refusal(resolved, {"zero_optimization": {"stage3_max_live_parameters": value}})
    assert error.problem == f"ds.json: zero_optimization.stage3_max_live_parameters: {value!r} is not accepted"
    assert error.allowed == 'a whole number, 0 or more, or "auto"'


@pytest.mark.parametrize(
    ("document", "suggestion"),
    [
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ({"gradient_acumulation_steps": 1}, "did you mean gradient_accumulation_steps?"),
        ({"qqq": 1}, "remove qqq"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"zero_optimization": {"offload_optimiser": {}}}, "did you mean zero_optimization.offload_optimizer?"),
        ({"bf16": {"enable": True}}, "did you mean bf16.enabled?"),
        ({"kernel": {}}, "did you mean kernels?"),
        ({"kernels": {"optimiser": "apex"}}, "did you mean kernels.optimizer?"),
        ({"kernels": {"attention": "flash"}}, "change kernels.attention"),
        ({"fp16": {"los_scale": 0}}, "did you mean fp16.loss_scale?"),
        (zero_3(offload_param={"devic": "cpu"}), "did you mean zero_optimization.offload_param.device?"),
        (
            {"train_batch_size": 64},
            'write "auto" here and training.global_batch_tokens=8192 on the command line',  # windows x 128 tokens
        ),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.99]}}},
            "write \"auto\" here and 'optimizer.betas=[0.9,0.99]' on the command line",
        ),
    ],
)
def test_a_refusal_suggests_an_action(document: dict[str, Any], suggestion: str, resolved: Resolve) -> None:
    assert refusal(resolved, document).action == suggestion
