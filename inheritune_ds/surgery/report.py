"""The inheritance report, the lineage and the model card of a target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lineage(report: Mapping[str, Any]) -> str:
    """One sentence on where a target comes from and which of its tensors are fresh."""
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
    """Which blocks a target has, and from where."""
    kept = report.get("previous_blocks", 0)
    if not kept:
        return f"blocks {report['selection']}"
    return (
        f"the {kept} blocks of the trained target `{report['previous']['name']}` with its embeddings, final norm and "
        f"head, then blocks {report['selection'][kept:]}"
    )


def target_card(report: Mapping[str, Any], licence: str, command: str) -> str:
    """Text of a target's model card: lineage, selection, what is fresh, licence, how to make it again.

    Args:
        report: The inheritance report.
        licence: What the reference's card says; empty if nothing.
        command: That builds this target.
    """
    front = [f"license: {licence}"] if licence and "," not in licence else []
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags: [inheritune]"]
    front_matter = "\n".join(front)
    inherited = report["inherit"] if isinstance(report["inherit"], str) else ", ".join(report["inherit"])
    state = "grown from an earlier target and not trained since" if report["previous"] else "not trained yet"
    terms = licence or "its card names none"
    holds = (
        f"the reference's ({terms}); its terms hold for this model, too" if report["reference"] else "see the corpus"
    )
    return f"""---
{front_matter}
---

# A target for continued pre-training

Made by inheritune_ds; **{state}**. `inheritance.json` lists every tensor with its source.

- Lineage: {lineage(report)}
- Selection: `{report["select"]}`; inherited: {inherited}; width: {report["width"]}
- Parameters: {report["parameters"]:,}, of them {report["block_parameters"]:,} in {report["blocks"]} blocks
- Licence: {holds}

Make it again:

```
{command}
```
"""


def target_summary(report: Mapping[str, Any], folder: Path) -> str:
    """The lines that tell a user what was built."""
    tensors = report["tensors"]
    fresh = sum(not tensor["inherited"] for tensor in tensors)
    left_out = ", ".join(report["left_out"][:3]) + (", ..." if len(report["left_out"]) > 3 else "")
    source = " of the reference" if report["selection"] else ""
    rows = {
        "blocks": f"{report['blocks']}: {blocks_of(report)}{source}",
        "parameters": f"{report['parameters']:,}, {report['block_parameters']:,} of them in blocks",
        "inherited": f"{len(tensors) - fresh} of {len(tensors)} tensors, {report['inherited_parameters']:,} parameters",
        "hidden state": report["proof"]["hidden_state"] or report["proof"]["hidden_state_reason"],
        **({"left out": f"{left_out}: no place in the model, or second copies"} if left_out else {}),
        "target": str(folder),
        "report": str(folder / "inheritance.json"),
    }
    return "\n".join(f"  {name:<13} {value}" for name, value in rows.items())
