"""Peak host memory of building an engine from a target's files, and of exporting it.

`python -m benchmarks.host_memory` writes a target in fp32 and in bf16 and builds the engine of each precision from it:
under ZeRO-1 on one rank, which then exports it, and under ZeRO-3 on two and four ranks, all in processes of their own.
A thread samples the anonymous memory of the process: pages mapped from a file do not count, since the kernel drops them
when memory is short. The figures are bytes per parameter of the model above what the process held before, those of the
rank with most: `load` while the target is loaded, before the engine takes it, `build` until the engine is ready. It
writes docs/results/host_memory.json; `--before FILE ...` adds the figures of other commits.
"""

import argparse
import itertools
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.ranks import Case, build_engine, join_ranks, run_ranks
from benchmarks.record import RESULTS, write_result

SAMPLE_S = 0.002
LARGE: dict[str, Any] = {"hidden_size": 512, "blocks": 8, "vocab_size": 16000}
SMALL: dict[str, Any] = {"hidden_size": 64, "blocks": 2, "vocab_size": 1024}
FILES, PRECISIONS = ("float32", "bfloat16"), ("fp32", "bf16")
RANKS = ((1, 1), (3, 2), (3, 4))
"""ZeRO stages and their numbers of ranks."""


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status: this needs Linux")


@contextmanager
def peak_growth(into: dict[str, float], name: str) -> Iterator[None]:
    """Note the largest growth of anonymous memory inside."""
    start, peak, ended = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            peak[0] = max(peak[0], anonymous_bytes() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    into[name] = float(peak[0])


def write_target(folder: Path, case: Case, dtype: str) -> None:
    """A model with its tokenizer, as surgery leaves a target."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from inheritune_ds.surgery.load import build_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(case.shape), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<s>": 0}, "<s>")))
    tokenizer.save_pretrained(folder)


def measure(out: Path, targets: tuple[Path, Path], case: Case) -> None:
    """Build an engine in this process, export it under ZeRO-1, and write the figures of this rank.

    Args:
        out: File of the figures, with the rank for its suffix.
        targets: Folder of a small target, for what every first engine imports, and of the one to measure.
        case: Of the engine.
    """
    world = join_ranks()
    from inheritune_ds.run.export import export_model

    build_engine(replace(case, **SMALL), world, targets[0])[0].close()
    found: dict[str, float] = {}
    with peak_growth(found, "build"):
        engine, _ = build_engine(case, world, targets[1], lambda: peak_growth(found, "load"))
    if case.stage == 1:
        with peak_growth(found, "export"):
            export_model(
                out.with_suffix(".export"),
                target_folder=targets[1],
                tokenizer_folder=targets[1],
                parameters=engine.full_parameters(),
                dtype="float32",
                card="",
                recipe_fingerprint="",
            )
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    figures = {f"{name}_bytes_per_parameter": round(value / parameters, 2) for name, value in found.items()}
    out.with_suffix(f".{world.rank}").write_text(json.dumps({"parameters": parameters, **figures}), encoding="utf-8")


def largest(out: Path, ranks: int) -> dict[str, float]:
    """The figures of the rank with most, of each kind."""
    figures = [json.loads(out.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in range(ranks)]
    return {name: max(of_rank[name] for of_rank in figures) for name in figures[0]}


def main() -> None:
    """Measure every file type and precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS / "host_memory.json")
    parser.add_argument("--before", type=Path, nargs="*", default=[], help="results of other commits, kept beside these")
    parser.add_argument("--rehearse", action="store_true", help="a toy model, to see that all works")
    parser.add_argument("--part", nargs=4, metavar=("FOLDER", "DTYPE", "PRECISION", "STAGE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SMALL if args.rehearse else LARGE
    if args.part:
        folder, dtype, precision, stage = args.part
        targets = Path(folder) / f"{dtype}-small", Path(folder) / dtype
        measure(Path(folder) / "out", targets, Case(stage=int(stage), precision=precision, **size))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in FILES:
            write_target(Path(scratch) / f"{dtype}-small", Case(**SMALL), dtype)
            write_target(Path(scratch) / dtype, Case(**size), dtype)
            for precision, (stage, ranks) in itertools.product(PRECISIONS, RANKS):
                words = ["--part", scratch, dtype, precision, str(stage), *["--rehearse"] * args.rehearse]
                run_ranks("benchmarks.host_memory", words, ranks)
                name = f"{dtype} files, {precision}, ZeRO-{stage}, {ranks} rank{'s' * (ranks > 1)}"
                found[name] = largest(Path(scratch) / "out", ranks)
    for name, figures in found.items():
        print(f"{name}: {figures}")
    others = [json.loads(path.read_text(encoding="utf-8")) for path in args.before]
    before = [{"commit": other["environment"]["commit"], "cases": other["cases"]} for other in others]
    write_result(args.out, {"cases": found, "before": before})


if __name__ == "__main__":
    main()
