"""Verify that the written target computes the same as the reference with its other blocks bypassed.

The target is loaded with `from_pretrained`. The reference is never whole in memory: a meta model holds the embeddings
and one block at a time, read from the source files again, so nothing of the written target is used. Each block runs
inside the reference's own forward pass, at its own index, on the output of the kept block before it. Masks, positions
and windows are therefore the reference's own.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inheritune_ds.console import Meter
from inheritune_ds.errors import SurgeryError
from inheritune_ds.plan import model_size
from inheritune_ds.storage.hub import first_line
from inheritune_ds.surgery.compare import as_bytes
from inheritune_ds.surgery.load import load_model
from inheritune_ds.surgery.meta_model import MetaModel
from inheritune_ds.surgery.reference import read_shape
from inheritune_ds.surgery.tensor_map import SourceModel
from inheritune_ds.surgery.tensor_values import TargetValues

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PROBE_TOKENS = 32
_GOLDEN_RATIO = 0.6180339887498949


def prove(folder: Path, values: TargetValues) -> dict[str, Any]:
    """Verify the written target; return the `proof` entry of the report, or raise a SurgeryError at any difference."""
    plan, skeleton = values.plan, values.skeleton
    tokens = probe_tokens(skeleton.config)
    start, hidden, rest = target_hidden_states(folder, skeleton, tokens)
    proven: dict[str, Any] = {"missing": 0, "unexpected": 0, "budget_parameters": _check_budget(skeleton)}
    fresh = [graft for graft in plan.grafts if graft.source is None]
    if values.half or plan.outer is None or any(graft.block is not None for graft in fresh):
        why = "half the width" if values.half else "fresh tensors in the blocks"
        return {**proven, "hidden_state": None, "hidden_state_reason": f"not comparable: {why}"}
    embedded = not any(graft.part in ("token_embeddings", "position_embeddings", "") for graft in fresh)
    expected = reference_hidden_state(
        plan.steps, tokens, dtype=skeleton.dtype, given=None if embedded else start, rest=rest
    )
    if not bool(torch.isfinite(expected).all()):
        raise SurgeryError(
            "the kept blocks of the reference give a hidden state that is not finite",
            action="copy or download the weights again: they are damaged, or their training diverged",
        )
    if not torch.equal(hidden, expected):
        difference = float((hidden.double() - expected.double()).abs().max())
        raise SurgeryError(
            "the target's hidden state differs from that of the reference's kept blocks by up to "
            f"{difference:.3g}; a block of this family depends on its index, or on more than the hidden state",
            allowed="a selection that keeps every block at its index: first:n",
            action="report this with the model's config.json: nothing was published",
        )
    return {
        **proven,
        "hidden_state": "equal, bit for bit",
        "hidden_state_start": "the reference's embeddings" if embedded else "the target's own embeddings",
        "hidden_state_sha256": hashlib.sha256(as_bytes(hidden).data).hexdigest(),
        "probe_tokens": tokens.numel(),
        "dtype": str(skeleton.dtype).removeprefix("torch."),
    }


def _check_budget(skeleton: MetaModel) -> int | None:
    """Compare the plan's parameter count with the model's; None for a family without one."""
    shape = read_shape(skeleton.config.to_dict(), "the target's config")
    if shape is None:
        return None
    expected, found = model_size.parameters(shape).total, count_parameters(skeleton)["parameters"]
    if expected != found:
        raise SurgeryError(
            f"the target has {found:,} parameters, the plan's arithmetic gives {expected:,}",
            action="report this with the model's config.json: nothing was published",
        )
    return expected


def probe_tokens(config: "PreTrainedConfig") -> torch.Tensor:
    """Token ids of shape (1, T), spread over the vocabulary; they depend on its size alone."""
    longest = getattr(config, "max_position_embeddings", None)
    count = min(PROBE_TOKENS, longest) if isinstance(longest, int) and longest > 0 else PROBE_TOKENS
    return torch.tensor([[int(config.vocab_size * ((n + 1) * _GOLDEN_RATIO % 1.0)) for n in range(count)]])


@torch.no_grad()
def target_hidden_states(
    folder: Path, skeleton: MetaModel, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Load the target, run it on ids of shape (B, T), and return the input of the first block, the output of the last.

    Both have the shape (B, T, width). The third result has the other outputs of a block; None: it has a tensor alone.

    Raises:
        SurgeryError: If the target does not load without missing or unexpected tensors.
    """
    model = load_model(folder, dtype=str(skeleton.dtype).removeprefix("torch."))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # matrix products may round differently on a mapped file: it is unaligned
    blocks = skeleton.blocks
    seen: dict[str, Any] = {}

    def note_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["input"] = (args[0] if args else kwargs["hidden_states"]).clone()

    def note_output(_: nn.Module, __: Any, output: Any) -> None:
        seen["hidden"] = _hidden(output).clone()
        seen["output"] = output

    first = model.get_submodule(f"{blocks.path}.0")
    last = model.get_submodule(f"{blocks.path}.{blocks.depth - 1}")
    first.register_forward_pre_hook(note_input, with_kwargs=True)
    last.register_forward_hook(note_output)
    _forward(model, tokens)
    rest = tuple(seen["output"][1:]) if isinstance(seen["output"], tuple | list) else None
    return seen["input"], seen["hidden"], rest


@torch.no_grad()
def reference_hidden_state(
    steps: Sequence[tuple[SourceModel, int]],
    tokens: torch.Tensor,
    *,
    dtype: torch.dtype,
    given: torch.Tensor | None,
    rest: tuple[Any, ...] | None,
) -> torch.Tensor:
    """Compute the hidden state after the kept blocks of the sources, of shape (B, T, width), from ids of shape (B, T).

    One block is in memory at a time. The state to start from is `given`, or None for the embeddings of the first
    block's source. `rest` has the other outputs of a block; None if it returns a tensor alone.
    """
    hidden = given
    runners: dict[str, _Runner] = {}
    with Meter("proving the target", "blocks", len(steps)) as meter:
        for source, block in steps:
            if source.role not in runners:
                runners[source.role] = _Runner(source, dtype, rest)
            hidden = runners[source.role].run(block, hidden, tokens)
            meter.advance(1)
    assert hidden is not None  # a selection has at least one block
    return hidden


class _Stop(Exception):  # noqa: N818 - no error: it ends a forward pass early
    """Carries the hidden state out of a forward pass."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Runner:
    """Runs single blocks of a source inside the source's own forward pass."""

    def __init__(self, source: SourceModel, dtype: torch.dtype, rest: tuple[Any, ...] | None) -> None:
        self._source, self._rest = source, rest
        self._skeleton = skeleton = (
            source.skeleton if source.skeleton.dtype == dtype else MetaModel(source.config, dtype)
        )
        blocks = skeleton.blocks
        # The head stays empty: every pass ends before it.
        head = skeleton.model.get_output_embeddings()
        embeddings = skeleton.model.get_input_embeddings()
        in_head = {
            name
            for name in source.module_of.values()
            if skeleton.model.get_submodule(name.rpartition(".")[0]) is head and head is not embeddings
        } - {*skeleton.tied, *skeleton.tied.values()}
        names = [name for name in source.by_block.get(None, []) if source.module_of[name] not in in_head]
        skeleton.fill(self._read(names), lambda name: blocks.index_of(name) is None and name not in in_head)
        for index in range(blocks.depth):
            skeleton.block(index).forward = self._bypass

    def _read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Copy tensors out of the mapped files, as in `target_hidden_states`."""
        return {self._source.loaded_as(name): self._source.files.tensor(name).clone() for name in names}

    def _bypass(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if self._rest is None else (hidden, *self._rest)

    def run(self, index: int, hidden: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """Run one block on a hidden state (None: the embeddings'); return its output."""
        skeleton = self._skeleton
        block = skeleton.block(index)
        names = self._source.by_block.get(index, [])
        skeleton.fill(self._read(names), lambda name: skeleton.blocks.index_of(name) == index)
        del block.forward  # the class's own again
        compute = block.forward

        def compute_and_stop(*args: Any, **kwargs: Any) -> Any:
            if hidden is not None and args:
                args = (hidden, *args[1:])
            elif hidden is not None:
                kwargs["hidden_states"] = hidden
            raise _Stop(_hidden(compute(*args, **kwargs)))

        block.forward = compute_and_stop
        try:
            _forward(skeleton.model, tokens)
        except _Stop as stop:
            return stop.hidden
        finally:
            block.forward = self._bypass
            block.to("meta")
        raise SurgeryError(
            f"a {self._source.config.model_type} model cannot be proven: its forward pass does not call its blocks"
        )


def _forward(model: "PreTrainedModel", tokens: torch.Tensor) -> None:
    try:
        model(input_ids=tokens, use_cache=False)
    except _Stop:
        raise
    except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
        raise SurgeryError(
            f"a {model.config.model_type} model cannot be proven: its forward pass on {tokens.shape[1]} token ids "
            f"fails: {first_line(error)}",
            allowed="a causal language model that takes input_ids alone",
        ) from None


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def count_parameters(skeleton: MetaModel) -> dict[str, int]:
    """Count parameters in total and in blocks; a tied head counts once."""
    named = list(skeleton.model.named_parameters())
    inside = [parameter.numel() for name, parameter in named if skeleton.blocks.index_of(name) is not None]
    return {"parameters": sum(parameter.numel() for _, parameter in named), "block_parameters": sum(inside)}
