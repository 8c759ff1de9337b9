"""The report of one run: tables and figures."""

from pathlib import Path

from inheritune_ds.report.comparison import Arm, paired_difference
from inheritune_ds.report.figures import draw_run
from inheritune_ds.report.results import RunResult, run_result
from inheritune_ds.report.tables import (
    AT_END,
    AT_START,
    difference_document,
    difference_parts,
    make_folder,
    note,
    reference_arm,
    reference_name,
    table,
    with_interval,
)
from inheritune_ds.storage.files import write_json, write_text


def write_run_report(run_dir: Path) -> Path:
    """Write report.md, report.json and curves.png into `run_dir`/report; return the path of report.md.

    Raises:
        RunFolderError: When the run has not finished, or one of its files is damaged.
        StorageError: When the folder cannot be written.
    """
    result = run_result(run_dir)
    folder = make_folder(run_dir)
    draw_run(folder / "curves.png", result)
    precision = result.summary.precision
    end, others = Arm(AT_END, precision, (result.final,)), []
    if result.initial:
        others.append(Arm(AT_START, precision, (result.initial,)))
    if result.reference is not None:
        others.append(reference_arm(result.reference))
    differences = [paired_difference(end, other) for other in others]
    text = note(end.estimate(), precision)
    document = {
        **result.document(),
        "reference": result.reference.document() if result.reference else None,
        "differences": [difference_document(difference) for difference in differences],
        "note": text,
    }
    write_json(folder / "report.json", document)
    parts = [
        f"# {result.summary.name}",
        "\n".join(_validation_table(result)),
        *difference_parts(differences),
        text,
        "\n".join(_facts_table(result)),
        "![Training and validation loss and the learning rate over the tokens seen](curves.png)",
        f"The exported model (a Hugging Face folder): `{result.export}`",
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


def _validation_table(result: RunResult) -> list[str]:
    rows = [(AT_START, result.initial)] if result.initial else []
    rows.append((AT_END, result.final))
    if result.reference is not None:
        rows.append((f"reference: {reference_name(result.reference.model)}", result.reference))
    body = [[name, *with_interval(found.pieces.estimate())] for name, found in rows]
    return table(["validation", f"val loss ({result.summary.precision})", "95 % interval"], body)


def _facts_table(result: RunResult) -> list[str]:
    summary = result.summary
    known = summary.unique_tokens is not None
    unique = f"{summary.unique_tokens:,}" if known else "not counted, windows were drawn at random"
    facts = {
        "parameters": f"{summary.parameters:,}",
        "blocks": f"{summary.blocks} ({summary.block_parameters:,} parameters in them)",
        "start": {"inherited": "inherited from the reference", "scratch": "random"}[summary.kind],
        "steps": f"{summary.steps:,}",
        "tokens seen": f"{summary.tokens_seen:,}",
        "unique tokens": f"{unique} ({summary.epochs:.2f} epochs)",
        "training time": f"{summary.train_seconds:,.0f} s",
        "ranks": f"{summary.world_size} (ZeRO stage {summary.zero_stage}, {summary.precision})",
        "fp32 master weights": {
            "refilled": f"the target's exact values, set again after DeepSpeed had rounded them ({summary.precision})",
            "fp32 model": "the target's exact values, as in the model itself",
        }[summary.master_weights],
        "recipe fingerprint": summary.recipe_fingerprint,
    }
    if result.reference is not None:
        facts["parameters of the reference"] = f"{result.reference.parameters:,}"
    return table(["of this run", ""], list(facts.items()))
