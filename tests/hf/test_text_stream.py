import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from fewbit.hf.text_stream import OrderedStream, TextOf
from models import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes only, so that every character outside ASCII takes several tokens."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([], vocab_size=260, special_tokens=["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")


@pytest.mark.parametrize("text", ["plain words", "naïve 🎄 — 東京", "é", " two  spaces\n\nand lines "])
def test_pieces_add_up_and_never_show_half_a_character(tokenizer, text):
    row = TextOf(tokenizer, ends=[0])
    pieces = [row.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + row.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) >= len(text)


def test_a_text_cut_inside_a_character_shows_that_it_is(tokenizer):
    row = TextOf(tokenizer, ends=[0])
    tokens = tokenizer("a🎄")["input_ids"][:-1]
    assert "".join(row.add(token) for token in tokens) == "a"
    assert row.finish() == "\N{REPLACEMENT CHARACTER}"


def test_nothing_follows_the_end_token(tokenizer):
    row = TextOf(tokenizer, ends=[0])
    letter = tokenizer("x")["input_ids"][0]
    assert [row.add(token) for token in (letter, 0, letter)] == ["x", "", ""]
    assert row.done


def test_words_of_a_real_tokenizer_keep_their_spaces():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the cat sat on the mat")["input_ids"]
    row = TextOf(tokenizer, ends=[])
    assert "".join(map(row.add, ids)) + row.finish() == tokenizer.decode(ids, skip_special_tokens=True)


def test_texts_come_in_order_the_first_at_once(tokenizer):
    written = []
    stream = OrderedStream(tokenizer, written.append, ends=[0], between="|")
    a, b, c = (tokenizer(letter)["input_ids"][0] for letter in "abc")
    stream.put(torch.tensor([[a, a], [b, b]]))  # the prompts
    stream.put(torch.tensor([a, b]))
    assert written == ["a"]
    stream.put(torch.tensor([a, 0]))
    stream.put(torch.tensor([0, c]))
    assert "".join(written) == "aa|b"
    stream.end()
    assert "".join(written) == "aa|b"


def test_what_is_held_back_is_written_at_the_end(tokenizer):
    written = []
    stream = OrderedStream(tokenizer, written.append, ends=[0], between="|", skip_prompt=False)
    first, second = tokenizer("é")["input_ids"], tokenizer("ab")["input_ids"]
    stream.put(torch.tensor([first[0], second[0]]))
    stream.put(torch.tensor([first[1], second[1]]))
    stream.end()
    assert "".join(written) == "é|ab"
