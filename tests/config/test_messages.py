"""Errors of invalid recipes: location, problem, allowed values, action."""

import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.errors import RecipeError


def message(*overrides: str, name: str = "quickstart") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


TRAINING = "duration, global_batch_tokens, packing, sampling, seq_len"
HUB = (
    "bad_records, data_files, dataset, download_gib, filters, kind, max_documents, max_tokens, name, revision, split, "
    "streaming, text_field, weight"
)
KINDS, POSITIVE = "embedded, files, hub or nanogpt", "a whole number above 0"
DURATION = "a count and a unit: 8 epochs, 100_000 steps, 250M tokens"
CASES = [
    ("training.seqlen=3", "Q: training.seqlen: unknown key", TRAINING, "did you mean training.seq_len?"),
    ("training.hub=3", "Q: training.hub: unknown key", TRAINING, "remove training.hub"),
    (
        "corpus.sources.0={kind: hub, dataset: a, data_files: b, data_file: c}",
        "Q: corpus.sources.0.data_file: unknown key",
        HUB,
        "did you mean corpus.sources.0.data_files?",
    ),
    (
        "corpus.sources.0={kind: hub, dataset: a}",
        "Q: corpus.sources.0.data_files: required key is missing",
        "text",
        "add corpus.sources.0.data_files",
    ),
    ("corpus.sources.0.kind=web", "Q: corpus.sources.0.kind: 'web' is unknown", KINDS, "set corpus.sources.0.kind"),
    (
        "corpus.sources.0={dataset: a}",
        "Q: corpus.sources.0.kind: required key is missing",
        KINDS,
        "set corpus.sources.0.kind",
    ),
    (
        "corpus.tokenizer={vocab_size: 5}",
        "Q: corpus.tokenizer.vocab_size: 5 is not accepted",
        "a whole number, 257 or more",
        "change corpus.tokenizer.vocab_size",
    ),
    (
        "corpus.tokenizer=5",
        "Q: corpus.tokenizer: 5 is not accepted",
        "text, or a mapping of vocab_size",
        "change corpus.tokenizer",
    ),
    (
        "corpus.tokenizer={vocab_size: 300, kind: bpe}",
        "Q: corpus.tokenizer.kind: unknown key",
        "vocab_size",
        "remove corpus.tokenizer.kind",
    ),
    (
        "corpus.sources=[]",
        "Q: corpus.sources: [] is not accepted",
        "a list with at least one item",
        "change corpus.sources",
    ),
    (
        "corpus.sources=3",
        "Q: corpus.sources: 3 is not accepted",
        "a list with at least one item",
        "change corpus.sources",
    ),
    (
        "training=3",
        "Q: training: 3 is not accepted",
        "a mapping of duration, global_batch_tokens, packing, sampling, seq_len",
        "change training",
    ),
    ("training.seq_len=x", "Q: training.seq_len: 'x' is not accepted", POSITIVE, "change training.seq_len"),
    ("training.seq_len=1.5", "Q: training.seq_len: 1.5 is not accepted", POSITIVE, "change training.seq_len"),
    ("training.seq_len=0", "Q: training.seq_len: 0 is not accepted", POSITIVE, "change training.seq_len"),
    ("seed=true", "Q: seed: True is not accepted", "a whole number, 0 or more, below 4294967296", "change seed"),
    ("optimizer.lr=on", "Q: optimizer.lr: 'on' is not accepted", "a number above 0", "change optimizer.lr"),
    ("optimizer.lr=.inf", "Q: optimizer.lr: inf is not accepted", "a finite number above 0", "change optimizer.lr"),
    ("optimizer.betas=0.9", "Q: optimizer.betas: 0.9 is not accepted", "a list", "change optimizer.betas"),
    ("description=", "Q: description: None is not accepted", "text", "change description"),
    (
        "reference.model=''",
        "Q: reference.model: '' is not accepted",
        "text of at least one character",
        "change reference.model",
    ),
    (
        "schedule.kind=cosinus",
        "Q: schedule.kind: 'cosinus' is not accepted",
        "cosine, constant or wsd",
        "change schedule.kind",
    ),
    (
        "training.duration=8 weeks",
        "Q: training.duration: '8 weeks' is not accepted",
        DURATION,
        "change training.duration",
    ),
    ("training.duration=5", "Q: training.duration: 5 is not accepted", DURATION, "change training.duration"),
    (
        "checkpoint={}",
        "Q: checkpoint.interval_steps: required key is missing",
        POSITIVE,
        "add checkpoint.interval_steps",
    ),
    ("target.inherit=5", "Q: target.inherit: 5 is not accepted", "text, or a list of text", "change target.inherit"),
    ("target.inherit=[5]", "Q: target.inherit.0: 5 is not accepted", "text", "change target.inherit.0"),
    (
        "optimizer.betas.2=0.5",
        "override optimizer.betas.2: '2' is not a position in a list of 2",
        "0 to 1",
        "override optimizer.betas itself",
    ),
    (
        "name=a b",
        "Q: name: 'a b' is not accepted",
        "a name of letters, digits, '.', '_' and '-', starting with a letter or digit",
        "change name",
    ),
    (
        "training.global_batch_tokens=9",
        "Q: training: global_batch_tokens 9 is not a multiple of seq_len 128; the nearest are 128",
        "",
        "",
    ),
    (
        "noequal",
        "override 'noequal' does not have the form key.path=value",
        "for instance training.seq_len=512",
        "quote a value with spaces: 'training.duration=200 steps'",
    ),
    (
        "corpus.sources.5=x",
        "override corpus.sources.5: '5' is not a position in a list of 1",
        "0 to 0",
        "override corpus.sources itself",
    ),
    (
        "training.seq_len.x=3",
        "override training.seq_len.x: training.seq_len holds 128, which has no keys",
        "training.seq_len=value",
        "override training.seq_len itself",
    ),
    (
        "seed={a: 1, a: 2}",
        'override seed, line 1: found duplicate key "a" with value "2" (original value: "1")',
        "YAML 1.2, each key once",
        "fix the file at that line",
    ),
]


@pytest.mark.parametrize(("override", "problem", "allowed", "action"), CASES, ids=[case[0] for case in CASES])
def test_load_recipe_reports_problem_allowed_values_and_action(
    override: str, problem: str, allowed: str, action: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    assert caught.value.problem.replace("quickstart:", "Q:") == problem
    assert (caught.value.allowed, caught.value.action) == (allowed, action)


def test_load_recipe_reports_all_problems_at_once() -> None:
    text = message("training.seqlen=3", "noequal", "optimizer.lr=-1", "a..b=1", "corpus.sources.7=1")
    assert text.startswith("5 problems found\n1. override 'noequal'")
    for part in ("override 'a..b=1'", "override corpus.sources.7", "optimizer.lr: -1", "training.seqlen: unknown key"):
        assert part in text
