"""What a reader is told about a recipe that cannot be used: where, what, what is allowed, what to do."""

import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.errors import RecipeError


def message(*overrides: str, name: str = "quickstart") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


ALLOWED_TRAINING = "duration, global_batch_tokens, packing, sampling, seq_len"
ALLOWED_HUB = (
    "bad_records, data_files, dataset, download_gib, filters, kind, max_documents, max_tokens, name, revision, split, "
    "streaming, text_field, weight"
)


@pytest.mark.parametrize(
    ("override", "lines"),
    [
        (
            "training.seqlen=3",
            [
                "quickstart: training.seqlen: unknown key",
                f"  allowed: {ALLOWED_TRAINING}",
                "  do: did you mean training.seq_len?",
            ],
        ),
        (
            "training.hub=3",  # `hub` is also the name of a kind of source
            ["quickstart: training.hub: unknown key", f"  allowed: {ALLOWED_TRAINING}", "  do: remove training.hub"],
        ),
        (
            "corpus.sources.0={kind: hub, dataset: a, data_files: b, data_file: c}",
            [
                "quickstart: corpus.sources.0.data_file: unknown key",
                f"  allowed: {ALLOWED_HUB}",
                "  do: did you mean corpus.sources.0.data_files?",
            ],
        ),
        (
            "corpus.sources.0={kind: hub, dataset: a}",
            [
                "quickstart: corpus.sources.0.data_files: required key is missing",
                "  allowed: text",
                "  do: add corpus.sources.0.data_files",
            ],
        ),
        (
            "corpus.sources.0.kind=web",
            [
                "quickstart: corpus.sources.0.kind: 'web' is unknown",
                "  allowed: embedded, files, hub or nanogpt",
                "  do: set corpus.sources.0.kind",
            ],
        ),
        (
            "corpus.sources.0={dataset: a}",
            [
                "quickstart: corpus.sources.0.kind: required key is missing",
                "  allowed: embedded, files, hub or nanogpt",
                "  do: set corpus.sources.0.kind",
            ],
        ),
        (
            "corpus.tokenizer={vocab_size: 5}",
            [
                "quickstart: corpus.tokenizer.vocab_size: 5 is not accepted",
                "  allowed: a whole number, 257 or more",
                "  do: change corpus.tokenizer.vocab_size",
            ],
        ),
        (
            "corpus.tokenizer=5",
            [
                "quickstart: corpus.tokenizer: 5 is not accepted",
                "  allowed: text, or a mapping of vocab_size",
                "  do: change corpus.tokenizer",
            ],
        ),
        (
            "corpus.tokenizer={vocab_size: 300, kind: bpe}",
            [
                "quickstart: corpus.tokenizer.kind: unknown key",
                "  allowed: vocab_size",
                "  do: remove corpus.tokenizer.kind",
            ],
        ),
        (
            "corpus.sources=[]",
            [
                "quickstart: corpus.sources: [] is not accepted",
                "  allowed: a list with at least one item",
                "  do: change corpus.sources",
            ],
        ),
        (
            "corpus.sources=3",
            [
                "quickstart: corpus.sources: 3 is not accepted",
                "  allowed: a list with at least one item",
                "  do: change corpus.sources",
            ],
        ),
        (
            "training=3",
            [
                "quickstart: training: 3 is not accepted",
                "  allowed: a mapping of duration, global_batch_tokens, packing, sampling, seq_len",
                "  do: change training",
            ],
        ),
        (
            "training.seq_len=x",
            [
                "quickstart: training.seq_len: 'x' is not accepted",
                "  allowed: a whole number above 0",
                "  do: change training.seq_len",
            ],
        ),
        (
            "training.seq_len=1.5",
            [
                "quickstart: training.seq_len: 1.5 is not accepted",
                "  allowed: a whole number above 0",
                "  do: change training.seq_len",
            ],
        ),
        (
            "training.seq_len=0",
            [
                "quickstart: training.seq_len: 0 is not accepted",
                "  allowed: a whole number above 0",
                "  do: change training.seq_len",
            ],
        ),
        (
            "seed=true",
            [
                "quickstart: seed: True is not accepted",
                "  allowed: a whole number, 0 or more, below 4294967296",
                "  do: change seed",
            ],
        ),
        (
            "optimizer.lr=on",
            [
                "quickstart: optimizer.lr: 'on' is not accepted",
                "  allowed: a number above 0",
                "  do: change optimizer.lr",
            ],
        ),
        (
            "optimizer.lr=.inf",
            [
                "quickstart: optimizer.lr: inf is not accepted",
                "  allowed: a finite number above 0",
                "  do: change optimizer.lr",
            ],
        ),
        (
            "optimizer.betas=0.9",
            ["quickstart: optimizer.betas: 0.9 is not accepted", "  allowed: a list", "  do: change optimizer.betas"],
        ),
        (
            "description=",
            ["quickstart: description: None is not accepted", "  allowed: text", "  do: change description"],
        ),
        (
            "reference.model=''",
            [
                "quickstart: reference.model: '' is not accepted",
                "  allowed: text of at least one character",
                "  do: change reference.model",
            ],
        ),
        (
            "schedule.kind=cosinus",
            [
                "quickstart: schedule.kind: 'cosinus' is not accepted",
                "  allowed: cosine, constant or wsd",
                "  do: change schedule.kind",
            ],
        ),
        (
            "training.duration=8 weeks",
            [
                "quickstart: training.duration: '8 weeks' is not accepted",
                "  allowed: a count and a unit: 8 epochs, 100_000 steps, 250M tokens",
                "  do: change training.duration",
            ],
        ),
        (
            "training.duration=5",
            [
                "quickstart: training.duration: 5 is not accepted",
                "  allowed: a count and a unit: 8 epochs, 100_000 steps, 250M tokens",
                "  do: change training.duration",
            ],
        ),
        (
            "checkpoint={}",
            [
                "quickstart: checkpoint.interval_steps: required key is missing",
                "  allowed: a whole number above 0",
                "  do: add checkpoint.interval_steps",
            ],
        ),
        (
            "target.inherit=5",
            [
                "quickstart: target.inherit: 5 is not accepted",
                "  allowed: text, or a list of text",
                "  do: change target.inherit",
            ],
        ),
        (
            "target.inherit=[5]",
            [
                "quickstart: target.inherit.0: 5 is not accepted",
                "  allowed: text",
                "  do: change target.inherit.0",
            ],
        ),
        (
            "optimizer.betas.2=0.5",
            [
                "override optimizer.betas.2: '2' is not a position in a list of 2",
                "  allowed: 0 to 1",
                "  do: override optimizer.betas itself",
            ],
        ),
        (
            "name=a b",
            [
                "quickstart: name: 'a b' is not accepted",
                "  allowed: a name of letters, digits, '.', '_' and '-', starting with a letter or digit",
                "  do: change name",
            ],
        ),
        (
            "training.global_batch_tokens=9",
            ["quickstart: training: global_batch_tokens 9 is not a multiple of seq_len 128; the nearest are 128"],
        ),
        (
            "noequal",
            [
                "override 'noequal' does not have the form key.path=value",
                "  allowed: for instance training.seq_len=512",
                "  do: quote a value with spaces: 'training.duration=200 steps'",
            ],
        ),
        (
            "corpus.sources.5=x",
            [
                "override corpus.sources.5: '5' is not a position in a list of 1",
                "  allowed: 0 to 0",
                "  do: override corpus.sources itself",
            ],
        ),
        (
            "training.seq_len.x=3",
            [
                "override training.seq_len.x: training.seq_len holds 128, which has no keys",
                "  allowed: training.seq_len=value",
                "  do: override training.seq_len itself",
            ],
        ),
        (
            "seed={a: 1, a: 2}",
            [
                'override seed, line 1: found duplicate key "a" with value "2" (original value: "1")',
                "  allowed: YAML 1.2, each key once",
                "  do: fix the file at that line",
            ],
        ),
    ],
)
def test_load_recipe_says_what_is_wrong_where_and_what_is_allowed(override: str, lines: list[str]) -> None:
    assert message(override).splitlines() == lines


def test_load_recipe_reports_all_problems_at_once() -> None:
    text = message("training.seqlen=3", "noequal", "optimizer.lr=-1", "a..b=1", "corpus.sources.7=1")
    assert text.startswith("5 problems found\n1. override 'noequal'")
    for part in ("override 'a..b=1'", "override corpus.sources.7", "optimizer.lr: -1", "training.seqlen: unknown key"):
        assert part in text
