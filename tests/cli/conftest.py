from pathlib import Path

import pytest

from tests.surgery import tiny


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny-llama"
    tiny.make_model("llama").save_pretrained(folder)
    tiny.make_tokenizer(40).save_pretrained(folder)
    return folder
