import pytest

import models
from fewbit.errors import ModelError
from fewbit.modeling.source import open_source


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 3}', '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_a_model_error(tmp_path, content):
    folder = models.save_tiny(tmp_path / "model", "llama")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="no tokenizer can be loaded from"):
        open_source(folder).load_tokenizer()
