"""A compiled fp32 run through `deepspeed train.py` up to its export, which is compared with the trained model."""

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.resume import Runs
from benchmarks.record import REPOSITORY
from inheritune_ds.storage.files import read_json, write_json

STEPS = 12


def fp32(part: Part) -> None:
    """A short run; compiled or Liger logits differ from an eager reload in their last bits."""
    document = read_json(REPOSITORY / "ds_configs" / part.sized("zero1.json", "cpu.json"))
    document["kernels"] |= {"compile": True}
    document["bf16"] = {"enabled": False}
    config = part.folder / "fp32.json"
    write_json(config, document)
    runs = Runs(part, str(config))
    part.report.expect("export")
    runs.finish("fp32", STEPS)
    run = read_json(runs.folder("fp32") / "run.json")
    part.report.figure("run", {key: run.get(key) for key in ("status", "precision", "kernels", "steps")})
    exported = (runs.folder("fp32") / "export" / "model.safetensors").is_file()
    part.report.bar("fp32 exports", int(exported and run["precision"] == "fp32"), at_least=1, of_gpu=False)
    part.report.done("export")
