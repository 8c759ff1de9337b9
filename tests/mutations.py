"""Mistakes that `test_mutations.py` plants in the surgery, the token stream and the schedule, and their tests."""

CUTS = ["tests/surgery/test_inherit.py", "tests/surgery/test_inherit_report.py"]
PRESETS, GROWTH = "tests/surgery/test_presets.py", "tests/surgery/test_growth.py"
OTHER_TESTS = {
    "surgery/inherit.py": [*CUTS, GROWTH],
    "surgery/tensor_values.py": [*CUTS, GROWTH],
    "surgery/tensor_map.py": ["tests/surgery/test_tensor_map.py", PRESETS],
    "surgery/blocks.py": ["tests/surgery/test_blocks.py", PRESETS],
    "surgery/verify.py": CUTS,
    "surgery/compare.py": CUTS,
    "plan/duration.py": ["tests/plan/test_memory.py"],
}
"""The tests that catch the mistakes of a module, where these are not just the file at its path."""
MUTATIONS: dict[str, list[tuple[str, ...]]] = {
    "config/selection.py": [
        ("the last blocks would be kept", "kept = range(self.count)\n", "kept = range(depth - self.count, depth)\n"),
        ("one block more than there is could be asked for", "<= self.count <= depth:", "<= self.count <= depth + 1:"),
        ("evenly spaced blocks would be rounded down", "(2 * i * (depth - 1) + gaps) //", "(2 * i * (depth - 1)) //"),
        ("the last block of a range would be lost", "in range(first, last + 1)]", "in range(first, last)]"),
        ("a block beyond the last could be named", "if last >= depth:", "if last > depth:"),
        ("the blocks with the lowest scores would be kept", "(-values[block], block)", "(values[block], block)"),
        ("blocks would be in the order of their scores", "return sorted(best)", "return best"),
        ("the mark would point beside the mistake", "{' ' * position}^", "{' ' * (position + 1)}^"),
    ],
    "config/inheritance.py": [
        (
            "the published copy would have a final norm that it did not have",
            '"paper-scripts": (*BLOCK_PARTS, "head"),',
            '"paper-scripts": (*BLOCK_PARTS, "head", "final_norm"),',
        ),
    ],
    "surgery/inherit.py": [
        (
            "every selection would give the first blocks",
            "[(origin, block) for block in selection], origin",
            "[(origin, place) for place in range(len(selection))], origin",
            "any_selection",
        ),
        (
            "a changed recipe would train the old target",
            '        or content_of(manifest.get("identity")) != content_of(identity)\n',
            "",
            "find_target",
        ),
        (
            "the reference's dropout would stay on",
            "set_dropout(config, target.dropout)",
            "config.use_cache = True",
            "says_its_dropout",
        ),
        (
            "the trained blocks would be thrown away when a target grows",
            "        steps[: outer.skeleton.blocks.depth] = ",
            "        steps[:0] = steps[:0]\n        _ = ",
            "trained_blocks_stay",
        ),
        (
            "any model would be taken for the target that grows",
            '    if differing:\n        raise SurgeryError(\n            f"previous',
            '    if not differing:\n        raise SurgeryError(\n            f"previous',
            "trained_blocks_stay",
        ),
    ],
    "surgery/tensor_values.py": [
        (
            "every seed would give the same baseline",
            "torch.manual_seed(self._seed)",
            "torch.manual_seed(0)",
            "depend_on_the_seed",
        ),
        (
            "a target that grows would have tensors of two types",
            "return torch.promote_types(tensor.dtype, self.skeleton.dtype)",
            "return tensor.dtype",
            "dtype_that_holds_both",
        ),
        (
            "a half-precision reference would give a target twice as large",
            "        return tensor.dtype\n",
            "        return torch.float32 if tensor.is_floating_point() else tensor.dtype\n",
            "keeps_the_reference_s_dtype",
        ),
    ],
    "surgery/tensor_map.py": [
        (
            "every block would have the number that it had",
            "words[self._number_at[name]] = str(place)",
            'words[self._number_at[name]] += ""',
            "keeps_its_own_type",
        ),
        (
            "every preset would inherit everything",
            "    return part in parts or (",
            "    return True or (",
            "published_scripts and attention",
        ),
        (
            "norms and biases would stay at their initial values",
            "if everything or _is_inherited(target, module, part, parts):",
            'if name.endswith("proj.weight") or _is_inherited(target, module, part, ()):',
            "published_scripts and llama",
        ),
        (
            "the head of a tied model would be random",
            'tied and part in ("token_embeddings", "head")',
            'not tied and part in ("token_embeddings", "head")',
            "published_scripts and gpt2",
        ),
        (
            "a head that is no copy of the embeddings would be lost",
            "if not torch.equal(self.files.tensor(name), self.files.tensor(first)):",
            "if self.files.tensor(name).shape != self.files.tensor(first).shape:",
            "no_copy",
        ),
        (
            "a deeper model than its config says would be cut",
            "if blocks.index_of(named[name]) is not None]",
            "if blocks.index_of(named[name]) == -1]",
            "contradicts",
        ),
        (
            "missing weights would be filled in at random",
            "for name in skeleton.required - given",
            "for name in skeleton.required & given - given",
            "missing",
        ),
        (
            "either of two tensors of the same name would be taken",
            "                if module in whole:\n",
            "                if name in whole:\n",
            "double",
        ),
        (
            "whole numbers would be taken for weights",
            "if known[module].is_floating_point() and not metas",
            "if not known[module].is_floating_point() and metas",
            "whole_numbers or whole",
        ),
    ],
    "surgery/blocks.py": [
        (
            "names that only begin like a block's would be renamed",
            'startswith(f"{self.path}."):',
            "startswith(self.path):",
            "whole_path",
        ),
        (
            "the norm of the MLP would come with the attention",
            'return "attention" if word[-1] == "1" else "mlp"',
            'return "attention"',
            "published_scripts and gpt2",
        ),
    ],
    "surgery/config_cut.py": [
        (
            "blocks would get the attention or rotary kind of other blocks",
            "return [value[block] for block in blocks]",
            "return value[: len(blocks)]",
        ),
        (
            "lists of block numbers would keep the old numbers",
            "return [place for place, block in enumerate(blocks) if block in value]",
            "return [block for block in blocks if block in value]",
        ),
        (
            "attention and experts would stay where they were in the deeper model",
            "wanted = [block % period == offset for block in blocks]",
            "wanted = [place % period == offset for place in range(len(blocks))]",
        ),
        ("as many blocks as before would be dense", "return {key: sum(dense)}", "return {key: first}"),
        (
            "blocks that divide their attention by their place could be moved",
            "if values.get(_INDEX_KEY) and tuple(blocks) != ",
            "if values.get(_INDEX_KEY) and tuple(blocks) == ",
        ),
        (
            "the reference's own config would be changed",
            "    values = config.to_dict()\n    if tuple(blocks)",
            "    values = config.to_dict()\n    config.num_hidden_layers = len(blocks)\n    if tuple(blocks)",
        ),
    ],
    "surgery/meta_model.py": [
        (
            "blocks with other settings would take each other's place",
            "if old == new or (old, new) in",
            "if old != new or (old, new) in",
        ),
        (
            "a quantized model would be cut",
            'getattr(config, "quantization_config", None) is not None',
            'getattr(config, "quantization_config", None) == ""',
        ),
    ],
    "surgery/verify.py": [
        (
            "the proof would compare the target with itself",
            "if not torch.equal(hidden, expected):",
            "if not torch.equal(hidden, hidden):",
            "computes_something_else",
        ),
        (
            "a tied head would count twice",
            "named = list(skeleton.model.named_parameters())",
            "named = list(skeleton.model.named_parameters(remove_duplicate=False))",
            "plan_count",
        ),
    ],
    "surgery/compare.py": [
        (
            "the report would call fresh tensors inherited",
            '"inherited": source is not None,',
            '"inherited": True,',
            "inherit_none",
        ),
        (
            "a file that was written wrongly would be published",
            "if not np.array_equal(piece, theirs[start : start + _CHUNK_BYTES]):",
            "if len(piece) != len(theirs[start : start + _CHUNK_BYTES]):",
            "read_back",
        ),
        (
            "numbers that are not finite would be trained",
            "    if written.is_floating_point():\n",
            "    if not written.is_floating_point():\n",
            "not_finite",
        ),
    ],
    "surgery/half_width.py": [
        (
            "half of GPT-2's queries, keys and values would be its queries and half of its keys",
            "for ending, pieces in _SEGMENTS.items():",
            "for ending, pieces in list(_SEGMENTS.items())[2:]:",
            "gpt2",
        ),
        (
            "heads would have half their size",
            '_HALVED = ("hidden_size", "num_attention_heads", ',
            '_HALVED = ("hidden_size", ',
            "first_heads",
        ),
    ],
    "surgery/weight_files.py": [
        ("tensors that the index forgets would be lost", "if absent or unlisted:", "if absent:", "index"),
        ("an index could name files anywhere", "if file != Path(file).name:", "if not file:", "elsewhere"),
        (
            "pickle would run code",
            "mmap=True, weights_only=True)\n    except",
            "mmap=True, weights_only=False)\n    except",
            "with_code",
        ),
        (
            "one tensor of two with the same name would be lost",
            "if tensor in self.file_of:",
            "if tensor in self._open:",
            "two_shards",
        ),
    ],
    "surgery/write_shards.py": [
        (
            "shards would be larger than they may",
            "if shards[-1] and filled + size > SHARD_BYTES:",
            "if shards[-1] and filled > SHARD_BYTES:",
            "shards_with_an_index",
        ),
        ("a target would fill the disk", "if size > free:", "if size < 0 > free:", "fit_on_the_disk"),
    ],
    "surgery/reference.py": [
        (
            "a damaged file of the hub's cache would be cut",
            "_SHA256.fullmatch(str(known)) and known != found:",
            "_SHA256.fullmatch(str(known)) and known == name:",
            "blob or shards_are_compared",
        ),
    ],
    "plan/duration.py": [
        (
            "the last window would have no next token",
            "return max(0, num_tokens - 1) // seq_len",
            "return num_tokens // seq_len",
        ),
    ],
    "data/stream/windows.py": [
        ("a window over the end of a shard would lose a token", "shard + 1, 0", "shard + 1, 1", "one_sequence"),
    ],
    "data/stream/order.py": [
        (
            "every epoch would have the same order",
            "epochs.astype(np.uint64) * _GOLDEN",
            "np.zeros_like(epochs, np.uint64)",
        ),
        (
            "a source that is added would reorder the others",
            'f"{seed}/{name}".encode()',
            'f"{seed}/{names.index(name)}".encode()',
            "order_seeds",
        ),
    ],
    "data/stream/mixture.py": [
        (
            "a source would have its windows of a round all at once",
            "(-(-(done[source] + 1) * length // turns[source]), source)",
            "(length, source)",
            "within_one_window",
        ),
        (
            "weights would change before their mark",
            "max(0, -(-(part.mark - self.starts[-1]) // length))\n",
            "max(0, (part.mark - self.starts[-1]) // length)\n",
            "changed_weights",
        ),
        (
            "a source would restart when the weights change",
            "base + rounds * turn for base, turn",
            "rounds * turn for base, turn",
            "changed_weights",
        ),
        (
            "a large corpus would run out of 64 bits",
            "(quotient << _HALF) + ((remainder << _HALF) + low * size) // whole\n",
            "counts * size // whole\n",
            "any_number_of_windows",
        ),
    ],
    "data/stream/batches.py": [
        (
            "another number of ranks would see another order",
            "positions_MRB[:, rank].ravel()",
            "positions_MRB.reshape(world_size, -1, micro_batch_size)[rank].ravel()",
        ),
        (
            "neighboring steps would share windows",
            "first = step * self.batch_windows",
            "first = step * (self.batch_windows - 1)",
        ),
        (
            "random windows would never have the last token for a target",
            "[count - tokens.seq_len for count",
            "[count - tokens.seq_len - 1 for count",
            "nanogpt",
        ),
    ],
    "data/stream/validation_windows.py": [
        ("windows would overlap", "self._ids[numbers] * self.seq_len", "self._ids[numbers] * (self.seq_len - 1)"),
        (
            "the validation windows would be the first ones",
            "(2 * np.arange(count, dtype=np.int64) + 1) * size // max(2 * count, 1)",
            "np.arange(count, dtype=np.int64)",
            "strided",
        ),
        (
            "a document that a limit has cut would continue in the next source",
            "np.searchsorted(self._ends, first) + sources",
            "np.searchsorted(self._ends, first)",
            "end_tokens",
        ),
        (
            "sources of weight 0 would be the first validation windows",
            "np.array([(1 + max(sizes)) * len(table)])",
            "np.array([-max(sizes) * len(table)])",
            "weight_0",
        ),
    ],
    "training/schedule.py": [
        (
            "the first update would not move",
            "return (step + 1) / (schedule.warmup_steps + 1)",
            "return step / schedule.warmup_steps",
        ),
        ("the last update would be above min_lr_ratio", "span = total_steps - 1 - start", "span = total_steps - start"),
        (
            "the cosine would fall along a quarter of a period",
            "0.5 * (1.0 + math.cos(math.pi * progress))",
            "math.cos(0.5 * math.pi * progress)",
        ),
        (
            "the decay of wsd would be a share of the steps after the warmup",
            "round(schedule.decay_ratio * total_steps)",
            "round(schedule.decay_ratio * (total_steps - start))",
        ),
    ],
}
"""By module: the effect on a run, a text that occurs in the module exactly once, what it becomes, and the tests of the
module that run, as pytest's -k selects them, where these are not all."""
