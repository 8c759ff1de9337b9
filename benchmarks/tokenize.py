"""`inheritune-ds prepare`: bytes/s against bare `tokenizers` on the same cores, and its memory as the corpus grows.

`python -m benchmarks.tokenize --data DIR` writes docs/results/tokenize.json; DIR holds corpora/books and
tokenizers/gpt2. Throughput: whole books with GPT-2's tokenizer, in turns (A B C, C B A), in one process: `prepare` from
the call to the published folder (files hashed, read, checked, cut, encoded by worker processes, written, synced and
hashed) against `encode_batch` and `encode_batch_fast` of the same books in memory, without using the ids. Memory: the
command in a separate process, on the books repeated (as further files) up to each size. Every 0.1 s the resident memory
of the command and its workers is summed: RSS counts a shared page twice, PSS once. The bar is for RSS.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison, in_turns, summary, verdict
from benchmarks.record import REPOSITORY, RESULTS, write_result
from inheritune_ds.config.corpus import Corpus, FilesSource
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.storage.files import write_json

SUBJECTS = ("project", "encode_batch", "encode_batch_fast")
MEGABYTE = 10**6
MEMORY_BAR_BYTES = 10**9
SAMPLE_S = 0.1
COMPARISONS = (
    Comparison("project over encode_batch", "project", "encode_batch", bar=0.8),
    Comparison("project over encode_batch_fast", "project", "encode_batch_fast"),
)


def read_books(data: Path, most_bytes: int | None) -> list[str]:
    """Texts of the books, at least two, up to `most_bytes` in all."""
    texts: list[str] = []
    size = 0
    for path in sorted((data / "corpora" / "books").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                text = json.loads(line)["text"]
                size += len(text.encode())
                if most_bytes is not None and size > most_bytes and len(texts) > 1:
                    return texts
                texts.append(text)
    return texts


def write_corpus(folder: Path, texts: Sequence[str], size: int) -> list[str]:
    """Write the books to a file and link it under other names until all have `size` bytes."""
    first = folder / "books-0000.jsonl"
    if not first.exists():
        first.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    paths = [first]
    while first.stat().st_size * len(paths) < size:
        path = folder / f"books-{len(paths):04}.jsonl"
        if not path.exists():
            os.link(first, path)
        paths.append(path)
    return [str(path) for path in paths]


def corpus_of(paths: list[str]) -> Corpus:
    """A corpus of files; a quarter of the documents is held out, so that no part is empty."""
    return Corpus(sources=[FilesSource(kind="files", name="books", paths=paths)], validation_ratio=0.25)


def subjects(texts: list[str], paths: list[str], tokenizer: str, scratch: Path) -> dict[str, Callable[[], int]]:
    """For every subject, a function that does all the work once and returns the number of tokens."""
    from tokenizers import Tokenizer

    bare: Any = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")

    def project() -> int:
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            tokens = prepare(corpus_of(paths), tokenizer, Path(cache))
        return tokens.train_tokens + tokens.validation_tokens

    def encode_batch() -> int:
        return sum(len(encoding.ids) + 1 for encoding in bare.encode_batch(texts))

    def encode_batch_fast() -> int:
        return sum(len(encoding.ids) + 1 for encoding in bare.encode_batch_fast(texts))

    return {"project": project, "encode_batch": encode_batch, "encode_batch_fast": encode_batch_fast}


def throughput(doing: dict[str, Callable[[], int]], size: int, rounds: int) -> dict[str, list[float]]:
    """MB/s of text of every subject, by round.

    Raises:
        SystemExit: The subjects differ in the number of tokens.
    """
    found: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    counts = set()
    for turn in in_turns(SUBJECTS, rounds):
        for name in turn:
            start = time.perf_counter()
            counts.add(doing[name]())
            found[name].append(size / MEGABYTE / (time.perf_counter() - start))
            print(f"  {name:<20}{found[name][-1]:8.2f} MB/s", flush=True)
    if len(counts) > 1:
        raise SystemExit(f"the subjects differ in the number of tokens: {sorted(counts)}")
    return found


def memory(paths: list[str], tokenizer: str, workers: int, scratch: Path) -> dict[str, Any]:
    """Run the command on files and measure its memory."""
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        recipe = Path(cache) / "recipe.yaml"
        write_json(recipe, _recipe(paths, tokenizer))
        command = [sys.executable, "-m", "inheritune_ds", "prepare", "--recipe", str(recipe)]
        command += ["--cache-dir", f"{cache}/cache", "--workers", str(workers)]
        watched = watch(command)
    size = sum(Path(path).stat().st_size for path in paths)
    return {"corpus_bytes": size, "workers": workers, **watched}


def watch(command: Sequence[str]) -> dict[str, Any]:
    """Run a command of this program and sum the memory of its processes until it ends.

    Raises:
        SystemExit: The command fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
    peaks = {"rss": 0, "pss": 0}
    processes = 0
    while process.poll() is None:
        members = _members(process.pid)
        processes = max(processes, len(members))
        for kind, held in _held(members).items():
            peaks[kind] = max(peaks[kind], held)
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {
        "processes": processes,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peaks["rss"],
        "peak_pss_bytes": peaks["pss"],
    }


def _recipe(paths: list[str], tokenizer: str) -> dict[str, Any]:
    """A recipe with the files as its corpus; its other keys are not used."""
    shape = {"model_type": "gpt2", "vocab_size": 50_257, "hidden_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "max_position_embeddings": 16, "tie_word_embeddings": True}
    return {
        "name": "books",
        "description": "memory of prepare",
        "target": {"shape": shape},
        "corpus": {**corpus_of(paths).model_dump(mode="json"), "tokenizer": tokenizer},
        "training": {"seq_len": 16, "global_batch_tokens": 16, "duration": "1 steps"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
        "validation": {"interval_steps": 1},
        "checkpoint": {"interval_steps": 1},
    }


def _members(session: int) -> list[int]:
    """Processes of a session."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == session:
                found.append(int(path.name))
    return found


def _held(processes: Sequence[int]) -> dict[str, int]:
    """Resident bytes of processes, RSS and PSS."""
    held = {"rss": 0, "pss": 0}
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        for line in lines:
            kind = line.partition(":")[0].lower()
            if kind in held:
                held[kind] += 1024 * int(line.split()[1])
    return held


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON file; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with corpora/books/*.jsonl.gz and tokenizers/gpt2")
    add("--rounds", type=int, default=6, help="turns of each subject (default: 6)")
    add("--sizes", type=int, nargs="*", default=[35, 250, 2000], help="MB of the corpora of the memory runs")
    add("--workers", type=int, default=2, help="workers of the memory runs (default: 2)")
    add("--rehearse", action="store_true", help="a toy: it tests this command, and measures nothing")
    add("--out", type=Path, help="JSON file (default: docs/results/tokenize.json; of a rehearsal: a temporary file)")
    args = parser.parse_args(arguments)
    if args.rehearse:
        args.rounds, args.sizes = 2, [8]
    figures = measure(args)
    print(*lines_of(figures), sep="\n", flush=True)
    out = args.out or (Path(tempfile.mkdtemp()) if args.rehearse else RESULTS) / "tokenize.json"
    write_result(out, {"rehearsal": args.rehearse, **figures})
    return 0 if args.rehearse or not missed(figures) else 1


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    texts = read_books(args.data, 4 * MEGABYTE if args.rehearse else None)
    tokenizer = str((args.data / "tokenizers" / "gpt2").resolve())
    size = sum(len(text.encode()) for text in texts)
    # If this is set, `tokenizers` uses its threads and does not warn when the process starts others later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        found = throughput(subjects(texts, write_corpus(scratch, texts, 0), tokenizer, scratch), size, args.rounds)
        held = []
        for megabytes in args.sizes:
            held.append(memory(write_corpus(scratch, texts, megabytes * MEGABYTE), tokenizer, args.workers, scratch))
            print(f"  {megabytes:>5} MB: {held[-1]['peak_rss_bytes'] / MEGABYTE:,.0f} MB", flush=True)
    ratios = {
        comparison.name: [
            own / other for own, other in zip(found[comparison.above], found[comparison.below], strict=True)
        ]
        for comparison in COMPARISONS
    }
    return {
        "text_bytes": size,
        "documents": len(texts),
        "mb_per_s": {name: summary([rates]) for name, rates in found.items()},
        "ratios": {
            comparison.name: {**(ratio := summary([ratios[comparison.name]])), "verdict": verdict(ratio, comparison)}
            for comparison in COMPARISONS
        },
        "memory_bar_bytes": MEMORY_BAR_BYTES,
        "memory": held,
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """Names of the missed bars."""
    ratios = [name for name, found in figures["ratios"].items() if found["verdict"] == "missed"]
    sizes = [
        f"memory at {held['corpus_bytes'] / MEGABYTE:,.0f} MB"
        for held in figures["memory"]
        if held["peak_rss_bytes"] >= figures["memory_bar_bytes"]
    ]
    return ratios + sizes


def lines_of(figures: dict[str, Any]) -> list[str]:
    """The figures as tables."""
    row = "{:<34}{:>10}  {:>18}  {}".format
    lines = [row("", "median", "95 % interval", "")]
    for name, found in (*figures["mb_per_s"].items(), *figures["ratios"].items()):
        unit = "" if name in figures["ratios"] else " MB/s"
        interval = "{:.2f} to {:.2f}".format(*found["interval_95"])
        lines.append(row(name + unit, f"{found['median']:.2f}", interval, found.get("verdict", "")).rstrip())
    row = "{:>12}{:>10}{:>12}{:>14}{:>14}".format
    lines.append(row("corpus, MB", "workers", "seconds", "peak RSS, MB", "peak PSS, MB"))
    for held in figures["memory"]:
        sizes = (f"{held[key] / MEGABYTE:,.0f}" for key in ("corpus_bytes", "peak_rss_bytes", "peak_pss_bytes"))
        size, rss, pss = sizes
        lines.append(row(size, held["workers"], f"{held['seconds']:,.0f}", rss, pss))
    return lines


if __name__ == "__main__":
    sys.exit(main())
