import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.blocks import BlockList, find_blocks, part_of
from tests.surgery.families import ENCODERS, TINY, VARIANTS, random_model
from tests.surgery.refusals import REFUSED


def test_find_blocks_prefers_the_outer_list() -> None:
    inner = nn.Module()
    inner.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
    outer = nn.Module()
    outer.layers = nn.ModuleList([inner, nn.Linear(1, 1)])
    assert find_blocks(outer, 2) == BlockList("layers", 2)


@pytest.mark.parametrize(
    ("lists", "depth", "found"),
    [({"left": 2, "right": 2}, 2, "left, right"), ({"left": 3}, 2, "none"), ({}, 1, "none")],
)
def test_find_blocks_refuses_to_guess(lists: dict[str, int], depth: int, found: str) -> None:
    model = nn.Module()
    for name, length in lists.items():
        setattr(model, name, nn.ModuleList(nn.Linear(1, 1) for _ in range(length)))
    with pytest.raises(SurgeryError) as caught:
        find_blocks(model, depth)
    expected = f"the blocks of a Module cannot be identified: module lists with {depth} entries: {found}"
    assert caught.value.problem == expected
    assert caught.value.allowed == "a decoder-only model with one list of blocks"


def test_block_list_numbers_by_whole_path() -> None:
    blocks = BlockList("model.layers", 12)
    assert blocks.index_of("model.layers.11.mlp.up.weight") == 11
    assert blocks.index_of("model.layers_norm.1.weight") is None
    assert blocks.index_of("model.layers_2.weight") is None
    assert blocks.index_of("model.embed.weight") is None


def leaf_norms(block: nn.Module, insides: list[str]) -> dict[str, nn.Module]:
    """Norms of a block outside its attentions and MLPs."""
    return {
        name: module
        for name, module in block.named_modules()
        if name
        and not list(module.children())
        and re.search(r"norm|(^|\.)(pre_)?ln", f"{type(module).__name__} {name}", re.IGNORECASE)
        and not any(name.startswith(f"{inside}.") for inside in insides)
        and list(module.parameters())
    }


def sub_modules(block: nn.Module) -> dict[str, str]:
    """Outermost modules of a block with the class of an attention or an MLP."""
    found: dict[str, str] = {}
    for name, module in block.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        kind = type(module).__name__
        above = type(block.get_submodule(name.rpartition(".")[0])).__name__
        if "Norm" in kind or ("Norm" in above and "Attention" not in above):
            continue  # a norm may be gated by a small MLP; DBRX's NormAttentionNorm holds an attention
        if re.search(r"(Attention|AttentionBlock|Attn|Mixer|ShortConv|DeltaNet|RecurrentBlock)$", kind):
            found[name] = "attention"
        elif re.search(r"(MLP|Mlp|MoE|Moe|FFN|FFNBlock|FeedForward|MoeBlock|Intermediate)$", kind) or name == "fc1":
            found[name] = "mlp"
    return found


def flow(model: PreTrainedModel, watched: dict[str, nn.Module]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each module in one pass."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            out = output[0] if isinstance(output, tuple | list) else output
            if isinstance(given, torch.Tensor) and isinstance(out, torch.Tensor):
                seen[name] = (given.clone().flatten(), out.clone().flatten())

        return hook

    for name, module in watched.items():
        module.register_forward_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 17)[None], use_cache=False)
    return seen


def is_sum(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a norm follows the residual sum of a part, as OpenAI-GPT's."""
    return total.shape == one.shape == other.shape and torch.allclose(total, one + other, atol=1e-6)


def judged_norms(kind: str) -> dict[str, tuple[str, set[str]]]:
    """Norms directly before or after a part, by name: the part by `part_of`, and the parts that the data allows."""
    model = random_model(kind, seed=2).eval()
    blocks = find_blocks(model, 6)
    judged: dict[str, tuple[str, set[str]]] = {}
    parts: dict[str, str] = {}
    norms: dict[str, nn.Module] = {}
    for index in range(6):
        path = f"{blocks.path}.{index}"
        own = sub_modules(model.get_submodule(path))
        parts |= {f"{path}.{name}": part for name, part in own.items()}
        norms |= {f"{path}.{n}": m for n, m in leaf_norms(model.get_submodule(path), list(own)).items()}
    seen = flow(model, norms | {name: model.get_submodule(name) for name in parts})
    for norm in norms.keys() & seen.keys():
        given, out = seen[norm]
        block = norm.removeprefix(f"{blocks.path}.").partition(".")[0]
        around = {n: p for n, p in parts.items() if n in seen and n.startswith(f"{blocks.path}.{block}.")}
        fits = {
            part
            for name, part in around.items()
            if torch.equal(out, seen[name][0]) or torch.equal(given, seen[name][1]) or is_sum(given, *seen[name])
        }
        if fits:
            leaf = next(name for name, _ in model.named_parameters() if name.startswith(f"{norm}."))
            judged[norm] = (part_of(model, blocks, leaf), {f"{part}_norms" for part in fits})
    return judged


DATAFLOW = [name for name in [*TINY, *VARIANTS] if name not in REFUSED]
SILENT = {
    # every norm lies inside an attention or an MLP
    *(kind for kind in ENCODERS if kind not in ("megatron-bert", "xlm-roberta-xl")),
    *("big_bird", "cpmant", "git", "rembert", "roc_bert", "xlnet", "xmod"),
    # norms without numbers
    *("nanochat", "olmo"),
    # the residual streams are mixed before and after each part
    *("qwen4_exp_text", "qwen4_exp_text+no_ple"),
}


@pytest.mark.parametrize("kind", DATAFLOW)
def test_a_norm_belongs_to_an_adjacent_part(kind: str) -> None:
    judged = judged_norms(kind)
    wrong = {name: found for name, found in judged.items() if found[0] not in found[1]}
    assert not wrong
    assert bool(judged) == (kind not in SILENT)
