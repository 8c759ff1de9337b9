import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.errors import RecipeError


def message(*overrides: str, name: str = "quickstart") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


TRAINING = "duration, global_batch_tokens, packing, sampling, seq_len"
HUB = (
    "bad_records, data_files, dataset, download_gib, filters, kind, max_documents, max_tokens, name, published_tokens, "
    "revision, split, streaming, text_field, weight"
)
KINDS, POSITIVE = "embedded, files, hub or nanogpt", "a whole number above 0"
DURATION = "a count and a unit: 8 epochs, 100_000 steps, 250M tokens"
VALUES = [
    ("corpus.tokenizer=5", "5", "text, or a mapping of vocab_size"),
    ("corpus.sources=[]", "[]", "a list with at least one item"),
    ("corpus.sources=3", "3", "a list with at least one item"),
    ("training=3", "3", "a mapping of duration, global_batch_tokens, packing, sampling, seq_len"),
    ("training.seq_len=x", "'x'", POSITIVE),
    ("training.seq_len=1.5", "1.5", POSITIVE),
    ("training.seq_len=0", "0", POSITIVE),
    ("seed=true", "True", "a whole number, 0 or more, below 4294967296"),
    ("optimizer.lr=on", "'on'", "a number above 0"),
    ("optimizer.lr=.inf", "inf", "a finite number above 0"),
    ("optimizer.betas=0.9", "0.9", "a list"),
    ("description=", "None", "text"),
    ("reference.model=''", "''", "text of at least one character"),
    ("schedule.kind=cosinus", "'cosinus'", "cosine, constant or wsd"),
    ("training.duration=8 weeks", "'8 weeks'", DURATION),
    ("training.duration=5", "5", DURATION),
    ("target.inherit=5", "5", "text, or a list of text"),
    ("name=a b", "'a b'", "a name of letters, digits, '.', '_' and '-', starting with a letter or digit"),
]


@pytest.mark.parametrize(("override", "value", "allowed"), VALUES, ids=[case[0] for case in VALUES])
def test_a_refused_value_is_reported_with_its_key_and_the_allowed_values(
    override: str, value: str, allowed: str
) -> None:
    key = override.partition("=")[0]
    lines = [f"quickstart: {key}: {value} is not accepted", f"  allowed: {allowed}", f"  do: change {key}"]
    assert message(override).splitlines() == lines


HUB_SOURCE = "corpus.sources.0={kind: hub, dataset: a, data_files: b, data_file: c}"
MISSING, LEAST = "required key is missing", "a whole number, 257 or more"
KEYS = [
    ("training.seqlen=3", "training.seqlen", "unknown key", TRAINING, "did you mean training.seq_len?"),
    ("training.hub=3", "training.hub", "unknown key", TRAINING, "remove {}"),
    (HUB_SOURCE, "corpus.sources.0.data_file", "unknown key", HUB, "did you mean corpus.sources.0.data_files?"),
    ("corpus.sources.0={kind: hub, dataset: a}", "corpus.sources.0.data_files", MISSING, "text", "add {}"),
    ("corpus.sources.0.kind=web", "corpus.sources.0.kind", "'web' is unknown", KINDS, "set {}"),
    ("corpus.sources.0={dataset: a}", "corpus.sources.0.kind", MISSING, KINDS, "set {}"),
    ("corpus.tokenizer={vocab_size: 5}", "corpus.tokenizer.vocab_size", "5 is not accepted", LEAST, "change {}"),
    (
        "corpus.tokenizer={vocab_size: 300, kind: bpe}",
        "corpus.tokenizer.kind",
        "unknown key",
        "vocab_size",
        "remove {}",
    ),
    ("checkpoint={}", "checkpoint.interval_steps", MISSING, POSITIVE, "add {}"),
    ("target.inherit=[5]", "target.inherit.0", "5 is not accepted", "text", "change {}"),
]
CASES = [
    *((override, f"{key}: {problem}", allowed, do.format(key)) for override, key, problem, allowed, do in KEYS),
    (
        "optimizer.betas.2=0.5",
        "override optimizer.betas.2: '2' is not a position in a list of 2",
        "0 to 1",
        "override optimizer.betas itself",
    ),
    (
        "training.global_batch_tokens=9",
        "training: global_batch_tokens 9 is not a multiple of seq_len 128; the nearest are 128",
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
    origin = "" if problem.startswith("override ") else "quickstart: "
    assert caught.value.problem == f"{origin}{problem}"
    assert (caught.value.allowed, caught.value.action) == (allowed, action)


def test_load_recipe_reports_all_problems_at_once() -> None:
    text = message("training.seqlen=3", "noequal", "optimizer.lr=-1", "a..b=1", "corpus.sources.7=1")
    assert text.startswith("5 problems found\n1. override 'noequal'")
    for part in ("override 'a..b=1'", "override corpus.sources.7", "optimizer.lr: -1", "training.seqlen: unknown key"):
        assert part in text
