"""Launched by tests: saves small states under several layouts, and loads each into engines of several layouts.

`drive_reshard.py FOLDER LAYOUT,... [LAYOUT,...]`: saves under each of the first list after two updates, then loads
every state below FOLDER into an engine of each of the second. It writes to FOLDER/loaded-<ranks>.json a sha256 of each
engine over masters, moments and weights as whole tensors, by name, after the load and after two more updates, and the
losses of these.

A layout is a ZeRO stage, a precision and letters: `2bf16o` offloads the optimizer, `3fp32s` cuts into small groups,
`1bf16a` accumulates in bf16, `2fp16x` is saved just after an overflow, `2fp16xx` after two and no update.
"""

import argparse
import gc
import hashlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.ranks import join_ranks
from inheritune_ds.checkpoints.fragments import MASTER, MOMENTS
from inheritune_ds.distributed.world import World
from tests import tiny

SHAPE = {
    **tiny.LLAMA,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
WINDOWS = 8


def build(layout: str, world: World, seed: int) -> Any:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    recipe = tiny.recipe(
        seed=seed,
        target={"shape": SHAPE},
        training={"seq_len": 8, "global_batch_tokens": 64, "duration": "4 steps"},
    )
    letters = layout[5:]
    zero: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}} if "o" in letters else {}
    if "s" in letters:
        zero["sub_group_size"] = 500
    # fp16 is refused on a CPU, which is slow at it; torch computes it all the same.
    with patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True):
        return tiny.engine(
            recipe,
            world,
            stage=int(layout[0]),
            precision=layout[1:5],
            fp16={"initial_scale_power": 10, "hysteresis": 2, "loss_scale_window": 2},
            zero_optimization=zero,
            data_types={"grad_accum_dtype": "bf16" if "a" in letters else "fp32"},
        )


def update(engine: Any, world: World, number: int) -> float:
    """One update on windows that depend on its number alone; the loss."""
    import torch

    generator = torch.Generator().manual_seed(number)
    windows = torch.randint(0, 257, (WINDOWS, 9), generator=generator)
    own = windows.view(-1, world.size, 2, 9)[:, world.rank]
    return float(engine.train_step(list(own), lr=1e-3).loss)


def digest(engine: Any) -> dict[str, str]:
    """sha256 of every parameter's rounded weight, master and moments, as whole tensors; no moments before an update."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    values = {}
    optimizer = engine._engine.optimizer
    kinds = MOMENTS if any(optimizer.optimizer.state.values()) else ()
    if kinds and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the moments of all groups after the first update of the first group, before others have any.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            values[f"{name}/weight"] = parameter.detach().clone()
        values[f"{name}/{MASTER}"] = safe_get_full_fp32_param(parameter)
        for kind in kinds:
            values[f"{name}/{kind}"] = safe_get_full_optimizer_state(parameter, kind)
    return {key: hashlib.sha256(value.float().cpu().numpy().tobytes()).hexdigest() for key, value in values.items()}


def update_to_overflow(engine: Any, world: World, number: int) -> None:
    """One update that is skipped, as its scaled gradients are not finite; then a scale that steps can use again."""
    scaler = engine._engine.optimizer.loss_scaler
    skipped, used, scaler.cur_scale = engine._engine.skipped_steps, scaler.cur_scale, 2.0**40
    update(engine, world, number)
    assert engine._engine.skipped_steps == skipped + 1
    scaler.cur_scale = used


def scaler_of(engine: Any) -> dict[str, Any]:
    found = getattr(engine._engine.optimizer, "loss_scaler", None)
    return {} if found is None else {key: str(value) for key, value in vars(found).items()}


def save(engine: Any, world: World, layout: str, folder: Path) -> None:
    from inheritune_ds.checkpoints.saver import Saver
    from inheritune_ds.checkpoints.store import CheckpointStore
    from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
    from inheritune_ds.config.reliability import Reliability

    saver = Saver(
        CheckpointStore(folder, keep=1),
        layout=SavedLayout(world.size, int(layout[0]), layout[1:5]),
        world=world,
        reliability=Reliability(on_save_error="stop"),
        fingerprints={},
    )
    saver.save(engine, TrainState(step=2))
    saver.close()


def failure_of_copy(engine: Any) -> str:
    from inheritune_ds.checkpoints.snapshot import PinnedBuffers

    with patch.object(PinnedBuffers, "copy", side_effect=RuntimeError("CUDA error: out of memory")):
        return str(engine.capture(PinnedBuffers()).failure)


def check_copies(engine: Any) -> None:
    """An async save writes bitwise what a synchronous one does, in the same order."""
    import torch

    from inheritune_ds.checkpoints.snapshot import PinnedBuffers

    own = engine.capture(None).fragments
    copied = engine.capture(PinnedBuffers()).fragments
    assert list(copied) == list(own)
    for key, value in own.items():
        assert copied[key].dtype == value.dtype, key
        assert torch.equal(copied[key].view(torch.uint8), value.cpu().view(torch.uint8)), key
        assert copied[key].data_ptr() != value.data_ptr(), key


def continued(engine: Any, world: World) -> dict[str, Any]:
    """What the engine holds now, and after two more updates."""
    now = {"digest": digest(engine), "scaler": scaler_of(engine), "step": engine._engine.global_steps}
    losses = [update(engine, world, number) for number in (2, 3)]
    return {**now, "losses": losses, "end": digest(engine), "end_scaler": scaler_of(engine)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("saved")
    parser.add_argument("loaded")
    args = parser.parse_args()
    world = join_ranks()
    from inheritune_ds.checkpoints.store import CheckpointStore
    from inheritune_ds.distributed.process_group import end_rank, start_process_group

    gc.freeze()  # DeepSpeed collects garbage while it builds an engine, and most of it belongs to imported modules
    report: dict[str, Any] = {}
    for layout in filter(None, args.saved.split(",")):
        engine = build(layout, world, seed=1)
        for number in range(2):
            (update_to_overflow if number >= 2 - layout.count("x") else update)(engine, world, number)
        name = f"{layout}-{world.size}"
        save(engine, world, layout, args.folder / name)
        check_copies(engine)
        report[name] = {"failure": failure_of_copy(engine), **continued(engine, world)}
        engine.close()
    start_process_group(world)  # all files are there
    states = sorted(path for path in args.folder.iterdir() if path.is_dir())
    for layout in filter(None, args.loaded.split(",")):
        engine = build(layout, world, seed=2)
        for state in states:  # one after the other into the same engine, as a rollback does
            if layout[1:5] in state.name:
                checkpoint = CheckpointStore(state, keep=1).newest_intact()
                assert checkpoint is not None
                report[f"{state.name} -> {layout}"] = {"notes": engine.load(checkpoint), **continued(engine, world)}
        engine.close()
    if world.is_main:
        (args.folder / f"loaded-{world.size}.json").write_text(json.dumps(report), encoding="utf-8")
    end_rank()


if __name__ == "__main__":
    main()
