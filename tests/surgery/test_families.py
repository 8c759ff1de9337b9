from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.blocks import find_blocks
from tests.surgery.families import NOT_TINY, TINY, VARIANTS, own_memory, random_model
from tests.surgery.refusals import IN_PLACE, REFUSED
from tests.surgery.tiny import block_output, cut

SELECTIONS = {"first:3": (0, 1, 2), "last:2": (4, 5), "0,2,5": (0, 2, 5), "even:3": (0, 3, 5)}
NAMES = [*TINY, *VARIANTS]
QUICK = {"gpt2", "llama", *NAMES[::10]}
"""The others take minutes; `make test-all` runs them."""


def state_after(folder: Path) -> torch.Tensor:
    """The output of the third block of a model that plain transformers loads and runs."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    own_memory(model)
    blocks = find_blocks(model, model.config.num_hidden_layers)
    return block_output(model, f"{blocks.path}.2")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]
)
def test_every_family_is_cut_exactly_or_refused(name: str, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    random_model(name).save_pretrained(reference)
    refused = dict.fromkeys(SELECTIONS, REFUSED[name]) if name in REFUSED else IN_PLACE.get(name, {})
    for number, (select, blocks) in enumerate(SELECTIONS.items()):
        output = tmp_path / str(number)
        if select in refused:
            with pytest.raises(SurgeryError) as caught:
                cut(reference, output, select=select, words=None)
            assert refused[select] in caught.value.problem, select
            assert not output.exists()
            continue
        report = cut(reference, output, select=select, words=None).report
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
