"""What a surgery did: inheritance.json and the model card, and the comparison of every written tensor."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inheritune_ds.data.progress import Meter
from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.weights import WeightFiles

if TYPE_CHECKING:
    from inheritune_ds.surgery.grafts import Graft

_CHUNK_BYTES = 1 << 24
_WORKERS = 2
"""hashlib and numpy let go of the interpreter while they work on a chunk."""


def describe_tensors(
    folder: Path, grafts: Sequence["Graft"], value: Callable[["Graft"], torch.Tensor]
) -> list[dict[str, Any]]:
    """Read every written tensor back, compare it with its source bit for bit, and describe it.

    Args:
        folder: The written target.
        grafts: What was written.
        value: Gives a graft's tensor from its source again, or the fresh one.

    Returns:
        Of each tensor: name, block, part, inherited, source (model, tensor, block, file; None if fresh), shape, dtype,
        sha256.

    Raises:
        SurgeryError: If a tensor on the disk is not the one that was meant, or holds a number that is not finite.
    """
    written = WeightFiles(folder, str(folder))
    described: list[dict[str, Any]] = []
    with Meter("comparing the target", "tensors", len(grafts)) as meter, ThreadPoolExecutor(_WORKERS) as pool:
        hashes = pool.map(lambda graft: _compare(written.tensor(graft.name), value(graft), graft), grafts)
        for graft, digest in zip(grafts, hashes, strict=True):
            described.append(_describe(graft, written, digest))
            meter.advance(1)
    return described


def _compare(written: torch.Tensor, meant: torch.Tensor, graft: "Graft") -> str:
    """Hash a written tensor (hex) while comparing it with the one that was meant, in pieces."""
    if written.dtype != meant.dtype or written.shape != meant.shape:
        raise _differs(graft)
    digest = hashlib.sha256()
    ours, theirs = as_bytes(written), as_bytes(meant)
    for start in range(0, len(ours), _CHUNK_BYTES):
        piece = ours[start : start + _CHUNK_BYTES]
        digest.update(piece.data)
        if not np.array_equal(piece, theirs[start : start + _CHUNK_BYTES]):
            raise _differs(graft)
    if written.is_floating_point():
        rows = written.reshape(-1)
        step = _CHUNK_BYTES // written.element_size()
        if not all(bool(torch.isfinite(rows[at : at + step]).all()) for at in range(0, len(rows), step)):
            raise SurgeryError(
                f"{graft.source_name or graft.name} of the {graft.source.role if graft.source else 'target'} holds a "
                "number that is not finite",
                action="bring the weights again: these are damaged, or their training had diverged",
            )
    return digest.hexdigest()


def _differs(graft: "Graft") -> SurgeryError:
    return SurgeryError(
        f"{graft.name} was not written as it was read",
        action="check the disk, then give the same command again",
    )


def as_bytes(tensor: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The bytes of a tensor, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, dtype=np.uint8)


def _describe(graft: "Graft", written: WeightFiles, digest: str) -> dict[str, Any]:
    tensor = written.tensor(graft.name)
    source = None
    if graft.source is not None:
        source = {
            "model": graft.source.role,
            "tensor": graft.source_name,
            "block": graft.source_block,
            "file": graft.source.files.file_of[graft.source_name],
        }
    return {
        "name": graft.name,
        "block": graft.block,
        "part": graft.part,
        "inherited": source is not None,
        "source": source,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": digest,
    }


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


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Hash the bytes of a tensor (hex), whatever its dtype."""
    return hashlib.sha256(as_bytes(tensor.cpu()).data).hexdigest()


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Hash of a whole state dict (hex): names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)} ".encode())
        digest.update(tensor_sha256(state[name]).encode())
    return digest.hexdigest()
