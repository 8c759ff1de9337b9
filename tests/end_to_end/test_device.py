"""The device of a launch from nvidia-smi and torch to the run: the right values where the wrong card decided before."""

import json
import os
from typing import Any

import pytest

from inheritune_ds.config.deepspeed import Machine
from inheritune_ds.config.loading import DEFAULT_RECIPE, load_recipe
from inheritune_ds.plan.micro_batch import resolve_for
from tests.launching import ROOT, environment
from tests.warm_python import WarmPython

A6000, RTX3090, T400 = (
    ("NVIDIA RTX A6000", 47.5, (8, 6)),
    ("NVIDIA GeForce RTX 3090", 23.7, (8, 6)),
    ("NVIDIA T400 4GB", 3.8, (7, 5)),
)
SLICE = ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.5, (8, 0))
SMI = {
    "A6000": "GPU-aaa1, NVIDIA RTX A6000, 49140, 48669, 8.6, [N/A]",
    "3090": "GPU-bbb2, NVIDIA GeForce RTX 3090, 24576, 24240, 8.6, [N/A]",
    "T400": "GPU-ccc3, NVIDIA T400 4GB, 4096, 3700, 7.5, [N/A]",
    "A100": "GPU-ddd4, NVIDIA A100-SXM4-80GB, 81920, 81000, 8.0, Enabled",
}
DOCUMENT = {"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
CASES: dict[str, tuple[tuple[str, ...], dict[str, str], list[Any]]] = {
    "a display card beside it": (("T400", "A6000"), {}, [A6000, T400]),
    "a 3090 as card 0, by number": (("3090", "A6000"), {"CUDA_VISIBLE_DEVICES": "1"}, [A6000]),
    "a 3090 as card 0, by UUID": (("3090", "A6000"), {"CUDA_VISIBLE_DEVICES": "GPU-aaa1"}, [A6000]),
    "no nvidia-smi": ((), {}, [A6000]),
    "a slice": (("A100",), {"CUDA_VISIBLE_DEVICES": "MIG-s1"}, [SLICE]),
    "all hidden": (("A6000",), {"CUDA_VISIBLE_DEVICES": ""}, []),
    "torch cannot use it": (("A6000",), {}, []),
}


@pytest.fixture(scope="module")
def results(warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a run of the default recipe would get in each case; one process plays them all."""
    folder = tmp_path_factory.mktemp("devices")
    cases = []
    for number, (smi, environ, cards) in enumerate(CASES.values()):
        tools = folder / str(number)
        tools.mkdir()
        if smi:
            lines = "\n".join(f"echo '{index}, {SMI[name]}'" for index, name in enumerate(smi))
            listed = "echo 'GPU 0: A100 (UUID: GPU-ddd4)'\necho '  MIG 3g.40gb  Device  0: (UUID: MIG-s1)'"
            tool = tools / "nvidia-smi"
            tool.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then\n{listed}\nelse\n{lines}\nfi\n')
            tool.chmod(0o755)
        cases.append({"environ": {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", **environ}, "cards": cards})
    (folder / "cases.json").write_text(json.dumps(cases))
    config = folder / "auto.json"
    config.write_text(json.dumps(DOCUMENT))
    words = ["--deepspeed_config", str(config), "--runs-dir", str(folder / "runs")]
    driver = str(ROOT / "tests" / "end_to_end" / "drive_device.py")
    log = folder / "log"
    with log.open("wb") as stream:
        line = [driver, str(folder / "cases.json"), str(folder / "results.json"), *words]
        process = warm.start(line, cwd=folder, env=environment(), stdout=stream)
    assert process.wait(timeout=110) == 0, log.read_text()
    return dict(zip(CASES, json.loads((folder / "results.json").read_text()), strict=True))


@pytest.mark.launch
@pytest.mark.parametrize(
    "case",
    ["a display card beside it", "a 3090 as card 0, by number", "a 3090 as card 0, by UUID", "no nvidia-smi"],
)
def test_the_run_gets_the_card_that_it_trains_on(results: dict[str, dict[str, Any]], case: str) -> None:
    found = results[case]
    assert found["code"] == 0, found["printed"]
    assert found["machine"] == {"kind": "cuda", "memory_gib": 47.5, "bf16": True, "name": "NVIDIA RTX A6000"}
    machine = Machine("cuda", 47.5, bf16=True)
    resolved = resolve_for(load_recipe(DEFAULT_RECIPE), DOCUMENT, "auto.json", world_size=1, machine=machine)
    assert (found["precision"], found["micro_batch_size"]) == ("bf16", resolved.micro_batch_size)
    assert (found["allocator"], found["accelerator"]) == ("expandable_segments:True", None)
    assert "device: NVIDIA RTX A6000, 47.5 GiB free" in found["printed"]
    assert found["printed"].count("--- budget") == 1, "the budget is printed once, for this card"
    assert f"train_micro_batch_size_per_gpu: {resolved.micro_batch_size} (auto: the largest that 48" in found["printed"]


@pytest.mark.launch
def test_the_run_gets_the_memory_of_its_slice(results: dict[str, dict[str, Any]]) -> None:
    machine = results["a slice"]["machine"]
    assert machine == {"kind": "cuda", "memory_gib": 39.5, "bf16": True, "name": SLICE[0]}


@pytest.mark.launch
def test_a_run_is_never_on_the_cpu_without_a_word(results: dict[str, dict[str, Any]]) -> None:
    refused, hidden = results["torch cannot use it"], results["all hidden"]
    assert refused["code"] == 10
    assert "this machine has a GPU, but torch" in refused["printed"]
    assert "device: the CPU, because CUDA_VISIBLE_DEVICES='' leaves no GPU\n" in hidden["printed"]
