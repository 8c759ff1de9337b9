"""Lineage, model card and summary of a target, from its inheritance report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lineage(report: Mapping[str, Any]) -> str:
    """Describe in one sentence the origin of a target and its fresh tensors."""
    reference, tensors = report["reference"], report["tensors"]
    if not reference:
        return "random values; nothing was inherited."
    commit = f" at commit `{reference['commit']}`" if reference["commit"] else ""
    half = ", half the width" if report["width"] == "half" else ""
    fresh = [tensor["part"] or "other" for tensor in tensors if not tensor["inherited"]]
    which = f" ({', '.join(sorted(set(fresh)))})" if fresh else ""
    return (
        f"{blocks_of(report)} of `{reference['name']}`{commit}{half}; {len(fresh)} of {len(tensors)} tensors were "
        f"fresh{which}."
    )


def blocks_of(report: Mapping[str, Any]) -> str:
    """Describe the blocks of a target and their sources."""
    kept = report.get("previous_blocks", 0)
    if not kept:
        return f"blocks {report['selection']}"
    return (
        f"the {kept} blocks of the trained target `{report['previous']['name']}` with its embeddings, final norm and "
        f"head, then blocks {report['selection'][kept:]}"
    )


def target_card(report: Mapping[str, Any], license_name: str, command: str) -> str:
    """Text of a target's model card; `license_name` is from the reference's card (empty if it names none)."""
    front = [f"license: {license_name}"] if license_name and "," not in license_name else []
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags: [inheritune]"]
    front_matter = "\n".join(front)
    inherited = report["inherit"] if isinstance(report["inherit"], str) else ", ".join(report["inherit"])
    state = "grown from an earlier target and not trained since" if report["previous"] else "not trained yet"
    terms = f"the reference's ({license_name or 'its card names none'}); its terms apply to this model, too"
    return f"""---
{front_matter}
---

# A target for continued pre-training

Made by inheritune_ds; **{state}**. `inheritance.json` lists every tensor with its source.

- Lineage: {lineage(report)}
- Selection: `{report["select"]}`; inherited: {inherited}; width: {report["width"]}
- Parameters: {report["parameters"]:,}, of them {report["block_parameters"]:,} in {report["blocks"]} blocks
- License: {terms if report["reference"] else "see the corpus"}

Rebuild it:

```
{command}
```
"""


def target_summary(report: Mapping[str, Any], folder: Path) -> str:
    """Summarize a target for the console."""
    tensors = report["tensors"]
    fresh = sum(not tensor["inherited"] for tensor in tensors)
    skipped = ", ".join(report["left_out"][:3]) + (", ..." if len(report["left_out"]) > 3 else "")
    source = " of the reference" if report["selection"] else ""
    rows = {
        "blocks": f"{report['blocks']}: {blocks_of(report)}{source}",
        "parameters": f"{report['parameters']:,}, {report['block_parameters']:,} of them in blocks",
        "inherited": f"{len(tensors) - fresh} of {len(tensors)} tensors, {report['inherited_parameters']:,} parameters",
        "hidden state": report["proof"]["hidden_state"] or report["proof"]["hidden_state_reason"],
        **({"skipped": f"{skipped}: no place in the model, or second copies"} if skipped else {}),
        "target": str(folder),
        "report": str(folder / "inheritance.json"),
    }
    return "\n".join(f"  {name:<13} {value}" for name, value in rows.items())
