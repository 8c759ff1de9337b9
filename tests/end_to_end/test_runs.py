"""Whole runs through the launchers: the flow, stopping, every launcher, the exported folder."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.launching import ROOT, Process, environment, free_port, srun_variables

CPU = str(ROOT / "ds_configs" / "cpu.json")
Launch = Callable[..., str]
Start = Callable[..., Process]
Recipe = Callable[..., Path]

LOADER = """
import json, sys
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
export, probe = sys.argv[1:]
with safe_open(probe, "pt") as file:
    torch.set_num_threads(int(file.metadata()["threads"]))
    tokens, expected = file.get_tensor("tokens"), file.get_tensor("logits")
model = AutoModelForCausalLM.from_pretrained(export).eval()
tokenizer = AutoTokenizer.from_pretrained(export)
with torch.no_grad():
    logits = model(input_ids=tokens).logits
text = tokenizer.decode(tokenizer("Story 7. the cat sees a tree.")["input_ids"])
print(json.dumps({"equal": torch.equal(logits, expected), "dtype": str(model.dtype), "text": text,
                  "package": "inheritune_ds" in sys.modules, "blocks": model.config.num_hidden_layers}))
"""


def arguments(recipe: Path, tmp_path: Path, runs: str = "runs", *more: str) -> list[str]:
    folders = ["--runs-dir", str(tmp_path / runs), "--cache-dir", str(tmp_path / "cache")]
    return ["--deepspeed_config", CPU, "--recipe", str(recipe), *folders, *more]


def wait_for(condition: Callable[[], bool], process: Process, log: Path) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.005)


def last_step(run: Path) -> int:
    """Last step in metrics.jsonl; -1 before there is one."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return int(json.loads(whole[-1])["step"]) if whole else -1


def status(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))


@pytest.mark.timeout(300)
def test_reference_recipe_is_trained_first_and_its_blocks_are_inherited(
    launch: Launch, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    reference = tiny_recipe("parent")
    recipe = tiny_recipe(
        "child", reference={"model": f"recipe:{reference}"}, target={"select": "first:2", "inherit": "moments"}
    )
    document = json.loads(recipe.read_text())
    document["corpus"].pop("tokenizer")  # the reference's is used
    recipe.write_text(json.dumps(document))
    exact = tmp_path / "fp32.json"  # cpu.json takes bf16 where the CPU has it; the export is compared bit for bit
    exact.write_text(json.dumps({**json.loads(Path(CPU).read_text()), "bf16": {"enabled": False}}))
    fp32 = ("--deepspeed_config", str(exact))
    parent, child = tmp_path / "runs" / "parent", tmp_path / "runs" / "child"
    launch("train.py", *arguments(recipe, tmp_path, "runs", *fp32, "--max-minutes", "0.001"))
    assert (status(child)["state"], status(child)["reason"]) == ("requeue", "its reference parent was stopped")
    first = launch("train.py", *arguments(recipe, tmp_path, "runs", *fp32), launcher="torchrun", ranks=2)
    assert status(parent)["state"] == status(child)["state"] == "finished"
    assert first.index("finished: parent") < first.index("finished: child")

    report = json.loads((child / "inheritance.json").read_text())
    trained, target = load_file(parent / "export/model.safetensors"), load_file(child / "target/model.safetensors")
    assert report["selection"] == [0, 1]
    assert {tensor["name"] for tensor in report["tensors"]} == set(target)
    assert all(tensor["inherited"] for tensor in report["tensors"])
    assert all((target[tensor["name"]] == trained[tensor["source"]["tensor"]]).all() for tensor in report["tensors"])
    scored = json.loads((child / "eval/reference.json").read_text())
    parent_final = json.loads((parent / "eval/validation-step-00000012.json").read_text())
    assert scored["pieces"]["losses"] == pytest.approx(parent_final["pieces"]["losses"], rel=1e-5)
    assert json.loads((child / "run.json").read_text())["blocks"] == 2
    decayed, undecayed = json.loads((child / "ds_config.resolved.json").read_text())["parameter_groups"]
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert {name for name in undecayed["parameters"] if "norm" not in name} == {"model.embed_tokens.weight"}
    assert len(decayed["parameters"]) == 2 * 7 + 1  # seven matrices a block, and the untied head
    assert f"optimizer state: carried from {parent / 'checkpoints/step-00000012'} (21 parameters)" in first
    saved = json.loads((child / "checkpoints/step-00000012/manifest.json").read_text())["parameters"]
    assert {parameter["step"] for parameter in saved.values()} == {12 + 12}  # the reference's updates and its own

    line = [sys.executable, "-I", "-c", LOADER, str(child / "export"), str(child / "eval/probe.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "equal": True,
        "dtype": "torch.float32",
        "text": "Story 7. the cat sees a tree.",
        "package": False,
        "blocks": 2,
    }

    before = {path: path.stat().st_mtime_ns for path in child.rglob("*") if path.is_file() and path.name != ".lock"}

    other = launch("train.py", *arguments(recipe, tmp_path, "runs", "optimizer.lr=0.001"), expect=8)
    assert "belongs to another recipe" in other
    assert "optimizer.lr: 0.003 -> 0.001" in other
    assert "Traceback" not in other
    assert {path: path.stat().st_mtime_ns for path in before} == before, "it belongs to another recipe"

    (tmp_path / "corpus.jsonl").unlink()
    page = os.path.relpath(child / "report/report.md", tmp_path)
    again = launch("train.py", *arguments(recipe, tmp_path))
    assert again.endswith(f"child: finished before; see {tmp_path / page}\n")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.timeout(300)
def test_interrupt_saves_and_exits_and_the_same_command_resumes(
    launch: Launch, start: Start, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    long = {"training": {"seq_len": 32, "global_batch_tokens": 512, "duration": "300 steps"}}
    recipe = tiny_recipe("stopped", checkpoint={"interval_steps": 1000}, **long)
    run = tmp_path / "runs" / "stopped"
    process = start("train.py", *arguments(recipe, tmp_path), launcher="python", **srun_variables(0, 1, free_port()))
    wait_for(lambda: last_step(run) >= 5, process, tmp_path / "run.log")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    stopped = status(run)
    assert stopped["state"] == "requeue"
    assert "SIGINT" in stopped["reason"]
    assert stopped["step"] >= 5
    assert (run / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()
    log = (tmp_path / "run.log").read_text()
    assert f"stopped and saved at step {stopped['step']}" in log
    assert "Traceback" not in log

    process = start("train.py", *arguments(recipe, tmp_path))
    wait_for(lambda: last_step(run) >= stopped["step"] + 3, process, tmp_path / "run.log")
    assert f"(step {stopped['step']}," in (tmp_path / "run.log").read_text()
    while process.poll() is None:  # two that come before the process is scheduled count as one
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.wait(timeout=30) == 130, "a second Ctrl-C exits at once"

    damaged = run / "checkpoints" / f"step-{stopped['step']:08d}" / "manifest.json"
    document = json.loads(damaged.read_text())
    victim = damaged.parent / max(document["files"], key=lambda name: document["files"][name]["bytes"])
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    output = launch("train.py", *arguments(recipe, tmp_path), expect=4)
    assert f"{victim.relative_to(damaged.parent)} has blake3" in output
    assert "Traceback" not in output
    assert status(run)["state"] == "failed"
    assert status(run)["exit_code"] == 4
