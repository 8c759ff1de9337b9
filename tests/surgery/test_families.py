"""Every causal language model of the installed transformers: cut exactly in four ways, or refused with its reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from inheritune_ds.config.model import Reference, Target
from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.blocks import find_blocks
from inheritune_ds.surgery.inherit import Cut, TargetModel, build_target
from inheritune_ds.surgery.load import load_config
from inheritune_ds.surgery.reference import locate
from tests.surgery.families import NOT_TINY, TINY, VARIANTS, own_memory, tiny_config
from tests.surgery.refusals import IN_PLACE, REFUSED

SELECTIONS = {"first:3": (0, 1, 2), "last:2": (4, 5), "0,2,5": (0, 2, 5), "even:3": (0, 3, 5)}
NAMES = [*TINY, *VARIANTS]
QUICK = {"gpt2", "llama", *NAMES[::10]}
"""The others take minutes, and belong to `make test-all`."""


def make_reference(name: str, folder: Path) -> None:
    """Save a tiny model in which no tensor keeps its initial value (a norm of ones says nothing)."""
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)


def cut(folder: Path, select: str, output: Path) -> TargetModel:
    chosen = Cut(
        target=Target(select=select),
        seed=1,
        identity={},
        command="",
        reference=locate(Reference(model=str(folder)), Path),
        reference_config=load_config(folder),
    )
    return build_target(chosen, output)


def state_after(folder: Path, block: int = 2) -> torch.Tensor:
    """The hidden state that leaves a block of a model as plain transformers loads and runs it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    own_memory(model)
    caught: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple | list) else output)

    blocks = find_blocks(model, model.config.num_hidden_layers)
    model.get_submodule(f"{blocks.path}.{block}").register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 29).view(2, 12), use_cache=False)
    return caught[0].clone()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]
)
def test_every_family_is_cut_exactly_or_refused(name: str, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    make_reference(name, reference)
    refused = dict.fromkeys(SELECTIONS, REFUSED[name]) if name in REFUSED else IN_PLACE.get(name, {})
    for number, (select, blocks) in enumerate(SELECTIONS.items()):
        output = tmp_path / str(number)
        if select in refused:
            with pytest.raises(SurgeryError) as caught:
                cut(reference, select, output)
            assert refused[select] in caught.value.problem, select
            assert not output.exists()
            continue
        report = cut(reference, select, output).report
        assert report["proof"]["hidden_state"] == "equal, bit for bit"
        assert tuple(report["selection"]) == blocks
        assert all(tensor["inherited"] for tensor in report["tensors"])
    if "first:3" not in refused:
        assert torch.equal(state_after(tmp_path / "0"), state_after(reference))


def test_every_type_of_the_library_is_in_one_list() -> None:
    known = {*TINY, *NOT_TINY}
    assert known == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert not {*TINY} & {*NOT_TINY}
    assert {*REFUSED, *IN_PLACE} <= {*NAMES}
    exact = [name for name in TINY if name not in REFUSED and name not in IN_PLACE]
    assert len(exact) >= 40
