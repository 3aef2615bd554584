"""Calibration batches: what every form of dataset becomes, and every refusal."""

import io
import itertools
import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

from fewbit import demo
from fewbit.calibration import Calibration, RetiredDatasetError, prepare
from fewbit.errors import CalibrationError, DependencyError, FewbitError

PROSE = demo.calibration_text().read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_path())


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def rows(calibration: Calibration) -> list[list[int]]:
    """All sequences without their padding."""
    result = []
    for batch in calibration.batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        result += [ids[m].tolist() for ids, m in zip(batch["input_ids"], mask, strict=True)]
    return result


def flat(calibration: Calibration) -> list[int]:
    return list(itertools.chain.from_iterable(rows(calibration)))


# ---------- running text ----------


def test_a_text_file_becomes_windows_of_the_whole_text(tmp_path, tokenizer):
    (tmp_path / "prose.txt").write_text(PROSE, encoding="utf-8")
    result = prepare(tmp_path / "prose.txt", tokenizer, num_samples=8, seq_len=100, batch_size=3)
    places = [PROSE.find(tokenizer.decode(row)) / len(PROSE) for row in rows(result)]
    assert min(places) >= 0
    assert all(len(row) == 100 for row in rows(result))
    assert all(
        part - 1.5 < 8 * place < part + 1.5 for part, place in enumerate(places)
    )  # spread over the text
    assert [len(batch["input_ids"]) for batch in result.batches] == [3, 3, 2]
    assert all(batch.keys() == {"input_ids"} for batch in result.batches)
    assert (result.tokens, result.sequences, result.source, result.notes) == (800, 8, "prose.txt", ())


def test_same_seed_same_batches_other_seed_other_windows(tmp_path, tokenizer):
    path = str(demo.calibration_text())
    first, again, other = (prepare(path, tokenizer, num_samples=8, seq_len=64, seed=s) for s in (5, 5, 6))
    assert first.fingerprint == again.fingerprint
    assert rows(first) == rows(again)
    assert first.fingerprint != other.fingerprint
    assert rows(first) != rows(other)


def test_too_short_a_text_gives_all_windows_and_says_so(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text(PROSE[:3000], encoding="utf-8")
    ids = ids_of(tokenizer, PROSE[:3000])
    result = prepare(path, tokenizer, num_samples=1000, seq_len=64)
    assert flat(result) == ids[: len(ids) // 64 * 64]
    assert result.notes == (f"the text gives {len(ids) // 64} windows of 64 tokens; 1000 were asked for",)


def test_the_only_window_may_be_incomplete(tmp_path, tokenizer):
    path = tmp_path / "one.txt"
    path.write_text("She was very much pleased.", encoding="utf-8")
    assert rows(prepare(path, tokenizer, num_samples=4, seq_len=512)) == [
        ids_of(tokenizer, "She was very much pleased.")
    ]


def test_a_text_too_long_to_hold_is_sampled_over_its_whole_length(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("fewbit.calibration.sampling._BLOCKS", 8)
    monkeypatch.setattr("fewbit.calibration.sampling._BLOCK_CHARACTERS", 2000)
    path = tmp_path / "long.txt"
    path.write_text(PROSE, encoding="utf-8")
    result = prepare(path, tokenizer, num_samples=None, seq_len=50)
    found = [PROSE.find(tokenizer.decode(row)) / len(PROSE) for row in rows(result)]
    assert min(found) >= 0
    assert found == sorted(found)
    assert found[0] < 0.25
    assert found[-1] > 0.75
    assert "was read" in result.notes[0]


def test_standard_input(tokenizer, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(PROSE[:5000].encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    result = prepare("-", tokenizer, num_samples=None, seq_len=32)
    ids = ids_of(tokenizer, PROSE[:5000])
    assert flat(result) == ids[: len(ids) // 32 * 32]
    assert result.source == "standard input"


def test_jsonl_and_parquet_and_datasets_with_text_are_one_running_text(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    documents = [text for text in PROSE[:20000].splitlines() if text]
    expected = ids_of(tokenizer, "\n\n".join(documents))
    expected = expected[: len(expected) // 40 * 40]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    table = datasets.Dataset.from_dict({"other": list(range(len(documents))), "text": documents})
    table.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", table, table.to_iterable_dataset()):
        assert flat(prepare(source, tokenizer, num_samples=None, seq_len=40)) == expected


def test_chats_go_through_the_chat_template(tmp_path, tokenizer):
    chats = [
        [{"role": "user", "content": "Is he amiable?"}, {"role": "assistant", "content": "Very."}],
        [{"role": "user", "content": "And rich?"}],
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats), encoding="utf-8")
    with pytest.raises(CalibrationError, match="no chat template"):
        prepare(path, tokenizer, seq_len=512)
    with_template = AutoTokenizer.from_pretrained(demo.model_path())
    with_template.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    expected = "[user] Is he amiable?\n[assistant] Very.\n[user] And rich?\n"
    assert rows(prepare(path, with_template, seq_len=512)) == [ids_of(tokenizer, expected)]


# ---------- named sets ----------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub that writes down what is asked of it."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_dict({"text": ["", " = Emma = ", PROSE[:4000], PROSE[4000:9000]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new"])
def test_named_sets_are_packed_and_ask_for_the_training_split(name, hub, tokenizer):
    text = "\n\n".join(["", " = Emma = ", PROSE[:4000], PROSE[4000:9000]])
    ids = ids_of(tokenizer, text)
    result = prepare(name, tokenizer, num_samples=None, seq_len=64)
    assert flat(result) == ids[: len(ids) // 64 * 64]
    assert result.source == name
    ((args, options),) = hub
    assert options["split"] == "train"
    if name == "wikitext2":
        assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    else:
        assert args == ("allenai/c4",)
        assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}


def test_an_unreachable_hub_is_said_in_words(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"'wikitext2' could not be loaded .*no route.*local"):
        prepare("wikitext2", tokenizer)


def test_a_missing_package_comes_with_the_command(monkeypatch, tokenizer, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="pip install datasets"):
        prepare("c4", tokenizer)
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DependencyError, match="pip install pyarrow"):
        prepare(tmp_path / "a.parquet", tokenizer)


def test_a_connection_lost_while_streaming_is_said_in_words(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")

    def rows(*args, **options):
        yield {"text": PROSE[:1000]}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(CalibrationError, match=r"'c4' could not be loaded .*reset by peer"):
        prepare("c4", tokenizer)


@pytest.mark.parametrize("name", ["ptb", "ptb-new"])
def test_ptb_is_no_longer_supported(name, tokenizer):
    with pytest.raises(RetiredDatasetError, match=f"'{name}' is no longer supported") as caught:
        prepare(name, tokenizer)
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, FewbitError)


# ---------- sequences ----------


def test_each_string_is_one_sequence_padded_on_the_right(tokenizer):
    texts = ["Mr. Darcy smiled.", "No.", "She had never been so agreeably surprised."]
    result = prepare(texts, tokenizer, batch_size=2, seq_len=512)
    assert rows(result) == [tokenizer(text)["input_ids"] for text in texts]
    mask = result.batches[0]["attention_mask"]
    assert mask.tolist() == mask.sort(dim=1, descending=True).values.tolist()
    assert bool((result.batches[0]["input_ids"][mask == 0] == tokenizer.pad_token_id).all())
    assert "attention_mask" not in result.batches[1]
    assert result.tokens == sum(map(len, rows(result)))


def test_long_strings_are_cut_and_empty_ones_left_out_with_notes(tokenizer):
    result = prepare([PROSE[:2000], "", "Yes."], tokenizer, num_samples=2, seq_len=16)
    assert rows(result) == [ids_of(tokenizer, PROSE[:2000])[:16], ids_of(tokenizer, "Yes.")]
    assert result.notes == (
        "1 empty sequences were left out",
        "1 of 2 sequences were longer than 16 tokens and were cut",
    )


def test_more_sequences_than_samples_are_chosen_evenly_with_a_note():
    dataset = [[i, i + 1] for i in range(40)]
    result = prepare(dataset, num_samples=4, seq_len=4)
    assert [row[0] // 10 for row in rows(result)] == [0, 1, 2, 3]
    assert result.notes == ("4 of 40 sequences were used: raise num_samples to use more",)
    assert len(prepare(dataset, num_samples=None, seq_len=8).batches) == 40


def test_a_list_with_far_less_text_than_asked_for_is_noted():
    (note,) = prepare([[1] * 7, [2] * 9], num_samples=4, seq_len=16).notes
    assert note.startswith(
        "the dataset gives 2 sequences of 8 tokens on average; 4 of 16 were asked for. More or longer"
    )
    assert prepare([[1] * 16] * 2, num_samples=4, seq_len=16).notes == ()


@pytest.mark.parametrize("wrap", [list, torch.tensor, lambda ids: torch.tensor([ids])])
def test_token_dicts_as_lists_and_tensors(wrap):
    result = prepare([{"input_ids": wrap([5, 6, 7]), "attention_mask": wrap([1, 1, 1])}])
    (batch,) = result.batches
    assert batch.keys() == {"input_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["input_ids"].dtype == torch.int64


def test_left_padding_moves_to_the_right_and_inner_masks_stay(tokenizer):
    dataset = [
        {"input_ids": [[0, 0, 5, 6], [1, 2, 3, 4]], "attention_mask": [[0, 0, 1, 1], [1, 0, 1, 1]]},
        {"input_ids": [9, 9], "attention_mask": [0, 0]},
    ]
    result = prepare(dataset, tokenizer, num_samples=2, seq_len=4, batch_size=2)
    pad = tokenizer.pad_token_id
    assert result.batches[0]["input_ids"].tolist() == [[5, 6, pad, pad], [1, 2, 3, 4]]
    assert result.batches[0]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 1, 1]]
    assert result.tokens == 5
    assert result.notes == ("1 empty sequences were left out",)


def test_other_keys_are_kept_per_token_ones_are_cut_and_padded(tokenizer):
    dataset = [
        {"input_ids": [1, 2, 3, 4], "token_type_ids": [1, 1, 1, 1], "language": torch.tensor([1, 1])},
        {"input_ids": [5], "token_type_ids": [1], "language": torch.tensor([0, 0])},
    ]
    (batch,) = prepare(dataset, tokenizer, batch_size=2, seq_len=3).batches
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["language"].tolist() == [[1, 1], [0, 0]]


def test_a_dataset_with_input_ids_keeps_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]})
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n{"input_ids": [3]}\n', encoding="utf-8")
    assert rows(prepare(table)) == rows(prepare(path)) == [[1, 2], [3]]


def test_encoder_decoder_batches_get_shifted_decoder_inputs(tokenizer):
    result = prepare([[5, 6, 7], [8]], tokenizer, batch_size=2, decoder_start_token_id=3)
    (batch,) = result.batches
    pad = tokenizer.pad_token_id
    assert batch["decoder_input_ids"].tolist() == [[3, 5, 6], [3, 8, pad]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_the_fingerprint_sees_every_id_and_every_mask():
    base = prepare([[1, 2, 3]]).fingerprint
    assert base == prepare([torch.tensor([1, 2, 3])]).fingerprint
    assert base != prepare([[1, 2, 4]]).fingerprint
    assert base != prepare([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}]).fingerprint
    assert prepare([[1, 2], [3, 4]]).fingerprint != prepare([[1, 2], [3, 4]], batch_size=2).fingerprint


# ---------- refusals ----------


def test_seq_len_is_capped_to_the_model():
    result = prepare([[1, 2, 3, 4, 5]], seq_len=2048, max_positions=4)
    assert rows(result) == [[1, 2, 3, 4]]
    assert result.notes[0] == "seq_len 2048 is more than the model's 4 positions: 4 used"


@pytest.mark.parametrize("ids", [[1, 50], [1, -2]])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(CalibrationError, match=r"sequence 1 has the token id (50|-2), .*vocabulary of 50"):
        prepare([[1, 2], ids], vocab_size=50)


def test_unequal_lengths_need_a_pad_token():
    with pytest.raises(CalibrationError, match=r"\(1 and 2 tokens\).*tokenizer.pad_token = .*batch_size 1"):
        prepare([[1, 2], [3]], batch_size=2)
    assert len(prepare([[1, 2], [3, 4]], batch_size=2).batches) == 1


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "no dataset given"),
        ([], "not one token"),
        ([""], "not one token"),
        ("wikitext3", r"no dataset 'wikitext3'.*wikitext2, c4, c4-new"),
        ("nowhere/text.txt", "not a file here"),
        ("It is a truth universally acknowledged " * 9, "pass it in a list"),
        (".", "is a folder"),
        (__file__, r"suffix '.py'"),
        (7, "dataset of type int"),
        ({"input_ids": [1]}, "dataset of type dict"),
        (b"text", "dataset of type bytes"),
        (["fine", 3.5], "element 1 is float"),
        ([{"text": "x"}], "element 0 is a dict with 'text'"),
        ([{"input_ids": [[[1]]]}], "one or two dimensions"),
        ([{"input_ids": [0.5, 1.5]}], "whole numbers"),
        ([{"input_ids": [[1, 2], [3]]}], "'input_ids' cannot be made a tensor"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask has shape"),
        ([{"input_ids": [[1, 2], [3, 4]], "extra": [[1]]}], "'extra' must have 2 rows"),
    ],
)
def test_datasets_that_cannot_be_used(dataset, message, tokenizer):
    with pytest.raises(CalibrationError, match=message):
        prepare(dataset, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "not one token"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2, is not JSON"),
        ("a.jsonl", b"[1]", "line 1, holds a list"),
        ("a.jsonl", b'{"body": "x"}', "it has 'body'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "row 2: 'text' is NoneType"),
        ("a.parquet", b"not parquet", "not a parquet file"),
    ],
)
def test_files_that_cannot_be_used(name, content, message, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        prepare(tmp_path / name, tokenizer)


def test_parquet_without_text_and_datasets_with_splits(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"body": ["x"]})
    table.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(CalibrationError, match="it has 'body'"):
        prepare(tmp_path / "b.parquet", tokenizer)
    with pytest.raises(CalibrationError, match=r"several splits \(train\)"):
        prepare(datasets.DatasetDict(train=table), tokenizer)


def test_text_without_a_tokenizer(tmp_path):
    with pytest.raises(CalibrationError, match="tokenizer is needed"):
        prepare(["text"])
    with pytest.raises(CalibrationError, match="tokenizer is needed"):
        prepare(demo.calibration_text())


def test_batches_that_do_not_fit_together():
    with pytest.raises(CalibrationError, match="one lacks extra"):
        prepare([{"input_ids": [1], "extra": [[1, 2]]}, {"input_ids": [1]}], batch_size=2)
    with pytest.raises(CalibrationError, match="'extra' has different shapes"):
        prepare([{"input_ids": [1], "extra": [[1] * (n + 1)]} for n in (1, 2)], batch_size=2)
