"""What a processor makes of images, sound and text, as calibration batches."""

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from fewbit.calibration import prepare
from fewbit.errors import CalibrationError
from models import tiny_tokenizer

IMAGE = {
    "input_ids": [[5, 9, 9, 6]],
    "attention_mask": [[0, 1, 1, 1]],
    "pixel_values": np.ones((1, 3, 4, 4), "f4"),
}


def test_a_batch_stays_as_it_is():
    result = prepare([BatchFeature(IMAGE, tensor_type="pt")], num_samples=1, seq_len=2)
    (batch,) = result.batches
    assert batch["input_ids"].tolist() == [[5, 9, 9, 6]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1]]
    assert batch["pixel_values"].shape == (1, 3, 4, 4)
    assert (result.tokens, result.sequences) == (3, 1)
    assert result.notes == (
        "1 of 1 sequences were longer than 2 tokens and were not cut, because they hold more than tokens",
    )


def test_arrays_and_lists_of_arrays_become_tensors():
    listed = {**IMAGE, "pixel_values": [np.ones((3, 4, 4), "f4")] * 2, "nothing": None}
    (batch,) = prepare([listed]).batches
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["pixel_values"].dtype == torch.float32
    assert "nothing" not in batch


def test_a_single_sample_gets_the_batch_dimension_where_it_lacks_it():
    sample = {
        "input_ids": torch.tensor([5, 9, 6]),
        "token_type_ids": torch.tensor([0, 1, 0]),
        "pixel_values": torch.ones(3, 4, 4),
        "image_sizes": torch.tensor([4, 4]),
    }
    (batch,) = prepare([sample]).batches
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (1, 3), "token_type_ids": (1, 3), "pixel_values": (1, 3, 4, 4), "image_sizes": (1, 2),
    }  # fmt: skip
    patches = {
        "input_ids": [5, 9, 6],
        "pixel_values": torch.ones(8, 12),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
    }
    (batch,) = prepare([patches]).batches
    assert batch["input_ids"].shape == (1, 3)
    assert batch["pixel_values"].shape == (8, 12)
    assert batch["image_grid_thw"].shape == (1, 3)
    sound = {"input_features": torch.ones(16, 60), "decoder_input_ids": torch.tensor([1, 2])}
    (batch,) = prepare([sound], decoder_start_token_id=1).batches
    assert batch["input_features"].shape == (1, 16, 60)
    assert batch["decoder_input_ids"].shape == (1, 2)


def test_text_beside_images_is_still_batched():
    result = prepare([[1, 2], IMAGE, [3, 4], [5, 6]], batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in result.batches] == [(1, 4), (2, 2), (1, 2)]
    assert result.sequences == 4


def test_the_fingerprint_sees_every_tensor():
    def fingerprint(**changes):
        return prepare([{**IMAGE, **changes}]).fingerprint

    assert fingerprint() == fingerprint()
    pixels = IMAGE["pixel_values"].copy()
    pixels[0, 2, 3, 3] = 2
    assert len({fingerprint(), fingerprint(pixel_values=pixels), fingerprint(sizes=torch.tensor([1]))}) == 3


def test_labels_say_what_the_decoder_reads():
    sound = {"input_features": torch.ones(1, 16, 60), "labels": torch.tensor([[7, 8, 9, -100]])}
    (batch,) = prepare([sound], decoder_start_token_id=3).batches
    assert batch["decoder_input_ids"].tolist() == [[3, 7, 8, 9]]
    assert "decoder_attention_mask" not in batch
    longer = {**sound, "labels": torch.tensor([[7, 8, -100, -100]])}
    (batch,) = prepare([longer], decoder_start_token_id=3).batches
    assert batch["decoder_input_ids"].tolist() == [[3, 7, 8, 3]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0]]


def test_placeholders_need_no_embedding():
    sample = {**IMAGE, "input_ids": [[5, 99, 99, 6]]}
    assert prepare([sample], vocab_size=50, placeholders={99}).sequences == 1
    with pytest.raises(CalibrationError, match="token id 99, outside the model's vocabulary of 50"):
        prepare([sample], vocab_size=50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pixel_values": [np.ones((3, 4, 4)), np.ones((3, 2, 2))]},
            r"'pixel_values' cannot be made a tensor.*return_ten",
        ),
        ({"prompt": "what is this?"}, r"element 0, 'prompt' cannot be made a tensor: .*Leave it out"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask has shape \(1, 2\), input_ids \(1, 4\)"),
        ({"input_ids": [[0.5]]}, "input_ids must be whole numbers"),
    ],
)
def test_what_is_no_batch(changes, message):
    with pytest.raises(CalibrationError, match=message):
        prepare([{**IMAGE, **changes}])


@pytest.mark.parametrize(
    "dataset",
    [
        np.arange(60).reshape(3, 20),
        np.arange(60, dtype=np.uint16).reshape(3, 20),
        [np.arange(i, i + 20) for i in (0, 20, 40)],
        torch.arange(60).view(3, 20),
    ],
    ids=["2-D array", "uint16", "list of arrays", "tensor"],
)
def test_arrays_of_token_ids(dataset):
    found = prepare(dataset, None, num_samples=3, seq_len=20)
    expected = prepare([list(range(i, i + 20)) for i in (0, 20, 40)], None, num_samples=3, seq_len=20)
    assert found.fingerprint == expected.fingerprint


def test_an_array_of_strings_is_a_list_of_strings():
    texts = ["one text", "another text"]
    found = prepare(np.array(texts), tiny_tokenizer(), seq_len=20)
    assert found.fingerprint == prepare(texts, tiny_tokenizer(), seq_len=20).fingerprint


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"a text", "another"}, "a set has another order in every run"),
        (np.arange(20), "dataset element 0 is int64"),
    ],
)
def test_what_has_no_order_or_no_sequences_is_refused(dataset, message):
    with pytest.raises(CalibrationError, match=message):
        prepare(dataset, tiny_tokenizer(), seq_len=20)
