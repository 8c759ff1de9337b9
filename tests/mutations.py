"""Mistakes that `test_mutations.py` plants in the surgery, and the tests that must catch each."""

from dataclasses import dataclass

SELECTION, PARTS = "config/selection.py", "config/inheritance.py"
INHERIT, VALUES, GRAFTS = "surgery/inherit.py", "surgery/tensor_values.py", "surgery/tensor_map.py"
BLOCKS, CONFIGS, SKELETON = "surgery/blocks.py", "surgery/config_cut.py", "surgery/meta_model.py"
PROOF, COMPARE, WIDTH = "surgery/verify.py", "surgery/compare.py", "surgery/half_width.py"
WEIGHTS, WRITING, REFERENCE = "surgery/weight_files.py", "surgery/write_shards.py", "surgery/reference.py"
PRESETS, GROWTH = "tests/surgery/test_presets.py", "tests/surgery/test_growth.py"
CUTS = ["tests/surgery/test_inherit.py", "tests/surgery/test_inherit_report.py"]
TESTS = {
    SELECTION: ["tests/config/test_selection.py"],
    PARTS: ["tests/config/test_inheritance.py"],
    INHERIT: [*CUTS, GROWTH],
    VALUES: [*CUTS, GROWTH],
    GRAFTS: ["tests/surgery/test_tensor_map.py", PRESETS],
    BLOCKS: ["tests/surgery/test_blocks.py", PRESETS],
    CONFIGS: ["tests/surgery/test_config_cut.py"],
    SKELETON: ["tests/surgery/test_meta_model.py"],
    PROOF: CUTS,
    COMPARE: CUTS,
    WIDTH: ["tests/surgery/test_half_width.py"],
    WEIGHTS: ["tests/surgery/test_weight_files.py"],
    WRITING: ["tests/surgery/test_write_shards.py"],
    REFERENCE: ["tests/surgery/test_reference.py"],
}


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        why: Its effect on a run.
        file: Module, below the package.
        old: Text that occurs there exactly once.
        new: What it becomes.
        only: Of the module's tests, those that pytest's -k selects; all when empty.
    """

    why: str
    file: str
    old: str
    new: str
    only: str = ""


MUTATIONS = [
    Mutation(
        "the last blocks would be kept",
        SELECTION,
        "kept = range(self.count)\n",
        "kept = range(depth - self.count, depth)\n",
    ),
    Mutation(
        "one block more than there is could be asked for",
        SELECTION,
        "<= self.count <= depth:",
        "<= self.count <= depth + 1:",
    ),
    Mutation(
        "evenly spaced blocks would be rounded down",
        SELECTION,
        "(2 * i * (depth - 1) + gaps) //",
        "(2 * i * (depth - 1)) //",
    ),
    Mutation(
        "the last block of a range would be lost", SELECTION, "in range(first, last + 1)]", "in range(first, last)]"
    ),
    Mutation("a block beyond the last could be named", SELECTION, "if last >= depth:", "if last > depth:"),
    Mutation(
        "the blocks with the lowest scores would be kept",
        SELECTION,
        "(-values[block], block)",
        "(values[block], block)",
    ),
    Mutation("blocks would be in the order of their scores", SELECTION, "return sorted(best)", "return best"),
    Mutation("the mark would point beside the mistake", SELECTION, "{' ' * position}^", "{' ' * (position + 1)}^"),
    Mutation(
        "the published copy would have a final norm that it did not have",
        PARTS,
        '"paper-scripts": (*BLOCK_PARTS, "head"),',
        '"paper-scripts": (*BLOCK_PARTS, "head", "final_norm"),',
    ),
    Mutation(
        "every selection would give the first blocks",
        INHERIT,
        "[(origin, block) for block in selection], origin",
        "[(origin, place) for place in range(len(selection))], origin",
        "any_selection",
    ),
    Mutation(
        "a changed recipe would train the old target",
        INHERIT,
        '        or content_of(manifest.get("identity")) != content_of(identity)\n',
        "",
        "find_target",
    ),
    Mutation(
        "the reference's dropout would stay on",
        INHERIT,
        "set_dropout(config, target.dropout)",
        "config.use_cache = True",
        "says_its_dropout",
    ),
    Mutation(
        "the trained blocks would be thrown away when a target grows",
        INHERIT,
        "        steps[: outer.skeleton.blocks.depth] = ",
        "        steps[:0] = steps[:0]\n        _ = ",
        "trained_blocks_stay",
    ),
    Mutation(
        "any model would be taken for the target that grows",
        INHERIT,
        '    if differing:\n        raise SurgeryError(\n            f"previous',
        '    if not differing:\n        raise SurgeryError(\n            f"previous',
        "trained_blocks_stay",
    ),
    Mutation(
        "every seed would give the same baseline",
        VALUES,
        "torch.manual_seed(self._seed)",
        "torch.manual_seed(0)",
        "depend_on_the_seed",
    ),
    Mutation(
        "a target that grows would have tensors of two types",
        VALUES,
        "return torch.promote_types(tensor.dtype, self.skeleton.dtype)",
        "return tensor.dtype",
        "dtype_that_holds_both",
    ),
    Mutation(
        "a half-precision reference would give a target twice as large",
        VALUES,
        "        return tensor.dtype\n",
        "        return torch.float32 if tensor.is_floating_point() else tensor.dtype\n",
        "keeps_the_reference_s_dtype",
    ),
    Mutation(
        "every block would have the number that it had",
        GRAFTS,
        "words[self._number_at[name]] = str(place)",
        'words[self._number_at[name]] += ""',
        "keeps_its_own_type",
    ),
    Mutation(
        "every preset would inherit everything",
        GRAFTS,
        "    return part in parts or (",
        "    return True or (",
        "published_scripts and attention",
    ),
    Mutation(
        "norms and biases would stay at their initial values",
        GRAFTS,
        "if everything or _is_inherited(target, module, part, parts):",
        'if name.endswith("proj.weight") or _is_inherited(target, module, part, ()):',
        "published_scripts and llama",
    ),
    Mutation(
        "the head of a tied model would be random",
        GRAFTS,
        'tied and part in ("token_embeddings", "head")',
        'not tied and part in ("token_embeddings", "head")',
        "published_scripts and gpt2",
    ),
    Mutation(
        "a head that is no copy of the embeddings would be lost",
        GRAFTS,
        "if not torch.equal(self.files.tensor(name), self.files.tensor(first)):",
        "if self.files.tensor(name).shape != self.files.tensor(first).shape:",
        "no_copy",
    ),
    Mutation(
        "a deeper model than its config says would be cut",
        GRAFTS,
        "if blocks.index_of(named[name]) is not None]",
        "if blocks.index_of(named[name]) == -1]",
        "contradicts",
    ),
    Mutation(
        "missing weights would be filled in at random",
        GRAFTS,
        "for name in skeleton.required - given",
        "for name in skeleton.required & given - given",
        "missing",
    ),
    Mutation(
        "either of two tensors of the same name would be taken",
        GRAFTS,
        "                if module in whole:\n",
        "                if name in whole:\n",
        "double",
    ),
    Mutation(
        "whole numbers would be taken for weights",
        GRAFTS,
        "if known[module].is_floating_point() and not metas",
        "if not known[module].is_floating_point() and metas",
        "whole_numbers or whole",
    ),
    Mutation(
        "names that only begin like a block's would be renamed",
        BLOCKS,
        'startswith(f"{self.path}."):',
        "startswith(self.path):",
        "whole_path",
    ),
    Mutation(
        "the norm of the MLP would come with the attention",
        BLOCKS,
        'return "attention" if word[-1] == "1" else "mlp"',
        'return "attention"',
        "published_scripts and gpt2",
    ),
    Mutation(
        "blocks would get the attention or rotary kind of other blocks",
        CONFIGS,
        "return [value[block] for block in blocks]",
        "return value[: len(blocks)]",
    ),
    Mutation(
        "lists of block numbers would keep the old numbers",
        CONFIGS,
        "return [place for place, block in enumerate(blocks) if block in value]",
        "return [block for block in blocks if block in value]",
    ),
    Mutation(
        "attention and experts would stay where they were in the deeper model",
        CONFIGS,
        "wanted = [block % period == offset for block in blocks]",
        "wanted = [place % period == offset for place in range(len(blocks))]",
    ),
    Mutation("as many blocks as before would be dense", CONFIGS, "return {key: sum(dense)}", "return {key: first}"),
    Mutation(
        "blocks that divide their attention by their place could be moved",
        CONFIGS,
        "if values.get(_INDEX_KEY) and tuple(blocks) != ",
        "if values.get(_INDEX_KEY) and tuple(blocks) == ",
    ),
    Mutation(
        "the reference's own config would be changed",
        CONFIGS,
        "    values = config.to_dict()\n    if tuple(blocks)",
        "    values = config.to_dict()\n    config.num_hidden_layers = len(blocks)\n    if tuple(blocks)",
    ),
    Mutation(
        "blocks with other settings would take each other's place",
        SKELETON,
        "if old == new or (old, new) in",
        "if old != new or (old, new) in",
    ),
    Mutation(
        "a quantized model would be cut",
        SKELETON,
        'getattr(config, "quantization_config", None) is not None',
        'getattr(config, "quantization_config", None) == ""',
    ),
    Mutation(
        "the proof would compare the target with itself",
        PROOF,
        "if not torch.equal(hidden, expected):",
        "if not torch.equal(hidden, hidden):",
        "computes_something_else",
    ),
    Mutation(
        "a tied head would count twice",
        PROOF,
        "named = list(skeleton.model.named_parameters())",
        "named = list(skeleton.model.named_parameters(remove_duplicate=False))",
        "plan_count",
    ),
    Mutation(
        "the report would call fresh tensors inherited",
        COMPARE,
        '"inherited": source is not None,',
        '"inherited": True,',
        "inherit_none",
    ),
    Mutation(
        "a file that was written wrongly would be published",
        COMPARE,
        "if not np.array_equal(piece, theirs[start : start + _CHUNK_BYTES]):",
        "if len(piece) != len(theirs[start : start + _CHUNK_BYTES]):",
        "read_back",
    ),
    Mutation(
        "numbers that are not finite would be trained",
        COMPARE,
        "    if written.is_floating_point():\n",
        "    if not written.is_floating_point():\n",
        "not_finite",
    ),
    Mutation(
        "half of GPT-2's queries, keys and values would be its queries and half of its keys",
        WIDTH,
        "for ending, pieces in _SEGMENTS.items():",
        "for ending, pieces in list(_SEGMENTS.items())[2:]:",
        "gpt2",
    ),
    Mutation(
        "heads would have half their size",
        WIDTH,
        '_HALVED = ("hidden_size", "num_attention_heads", ',
        '_HALVED = ("hidden_size", ',
        "first_heads",
    ),
    Mutation("tensors that the index forgets would be lost", WEIGHTS, "if absent or unlisted:", "if absent:", "index"),
    Mutation("an index could name files anywhere", WEIGHTS, "if file != Path(file).name:", "if not file:", "elsewhere"),
    Mutation(
        "pickle would run code",
        WEIGHTS,
        "mmap=True, weights_only=True)\n    except",
        "mmap=True, weights_only=False)\n    except",
        "with_code",
    ),
    Mutation(
        "one tensor of two with the same name would be lost",
        WEIGHTS,
        "if tensor in self.file_of:",
        "if tensor in self._open:",
        "two_shards",
    ),
    Mutation(
        "shards would be larger than they may",
        WRITING,
        "if shards[-1] and filled + size > SHARD_BYTES:",
        "if shards[-1] and filled > SHARD_BYTES:",
        "shards_with_an_index",
    ),
    Mutation("a target would fill the disk", WRITING, "if size > free:", "if size < 0 > free:", "fit_on_the_disk"),
    Mutation(
        "a damaged file of the hub's cache would be cut",
        REFERENCE,
        "_SHA256.fullmatch(str(known)) and known != found:",
        "_SHA256.fullmatch(str(known)) and known == name:",
        "blob or shards_are_compared",
    ),
]
