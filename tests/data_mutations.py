"""Mistakes that `test_mutations.py` plants in the token stream and the schedule, and the tests that catch them."""

from tests.mutations import Mutation

SHARDS, ORDER, MIXTURE = "data/stream/windows.py", "data/stream/order.py", "data/stream/mixture.py"
STREAM, HELD_OUT, SCHEDULE = "data/stream/batches.py", "data/stream/validation_windows.py", "training/schedule.py"
DURATION = "plan/duration.py"
TESTS = {
    SHARDS: ["tests/data/stream/test_windows.py"],
    ORDER: ["tests/data/stream/test_order.py"],
    MIXTURE: ["tests/data/stream/test_mixture.py"],
    STREAM: ["tests/data/stream/test_batches.py"],
    HELD_OUT: ["tests/data/stream/test_validation_windows.py"],
    SCHEDULE: ["tests/training/test_schedule.py"],
    DURATION: ["tests/plan/test_memory.py"],
}

MUTATIONS = [
    Mutation(
        "the last window would have no next token",
        DURATION,
        "return max(0, num_tokens - 1) // seq_len",
        "return num_tokens // seq_len",
    ),
    Mutation(
        "windows would overlap",
        HELD_OUT,
        "self._ids[numbers] * self.seq_len",
        "self._ids[numbers] * (self.seq_len - 1)",
    ),
    Mutation(
        "a window over the end of a shard would lose a token",
        SHARDS,
        "shard + 1, 0",
        "shard + 1, 1",
        "one_sequence",
    ),
    Mutation(
        "every epoch would have the same order",
        ORDER,
        "epochs.astype(np.uint64) * _GOLDEN",
        "np.zeros_like(epochs, np.uint64)",
    ),
    Mutation(
        "a source that is added would reorder the others",
        ORDER,
        'f"{seed}/{name}".encode()',
        'f"{seed}/{names.index(name)}".encode()',
        "order_seeds",
    ),
    Mutation(
        "a source would have its windows of a round all at once",
        MIXTURE,
        "(-(-(done[source] + 1) * length // turns[source]), source)",
        "(length, source)",
        "within_one_window",
    ),
    Mutation(
        "weights would change before their mark",
        MIXTURE,
        "max(0, -(-(part.mark - self.starts[-1]) // length))\n",
        "max(0, (part.mark - self.starts[-1]) // length)\n",
        "changed_weights",
    ),
    Mutation(
        "a source would restart when the weights change",
        MIXTURE,
        "base + rounds * turn for base, turn",
        "rounds * turn for base, turn",
        "changed_weights",
    ),
    Mutation(
        "a large corpus would run out of 64 bits",
        MIXTURE,
        "(quotient << _HALF) + ((remainder << _HALF) + low * size) // whole\n",
        "counts * size // whole\n",
        "any_number_of_windows",
    ),
    Mutation(
        "another number of ranks would see another order",
        STREAM,
        "positions_MRB[:, rank].ravel()",
        "positions_MRB.reshape(world_size, -1, micro_batch_size)[rank].ravel()",
    ),
    Mutation(
        "neighboring steps would share windows",
        STREAM,
        "first = step * self.batch_windows",
        "first = step * (self.batch_windows - 1)",
    ),
    Mutation(
        "random windows would never have the last token for a target",
        STREAM,
        "[count - tokens.seq_len for count",
        "[count - tokens.seq_len - 1 for count",
        "nanogpt",
    ),
    Mutation(
        "sources of weight 0 would be the first validation windows",
        HELD_OUT,
        "np.array([(1 + max(sizes)) * len(table)])",
        "np.array([-max(sizes) * len(table)])",
        "weight_0",
    ),
    Mutation(
        "the first update would not move",
        SCHEDULE,
        "return (step + 1) / (schedule.warmup_steps + 1)",
        "return step / schedule.warmup_steps",
    ),
    Mutation(
        "the last update would be above min_lr_ratio",
        SCHEDULE,
        "span = total_steps - 1 - start",
        "span = total_steps - start",
    ),
    Mutation(
        "the cosine would fall along a quarter of a period",
        SCHEDULE,
        "0.5 * (1.0 + math.cos(math.pi * progress))",
        "math.cos(0.5 * math.pi * progress)",
    ),
    Mutation(
        "the decay of wsd would be a share of the steps after the warmup",
        SCHEDULE,
        "round(schedule.decay_ratio * total_steps)",
        "round(schedule.decay_ratio * (total_steps - start))",
    ),
]
