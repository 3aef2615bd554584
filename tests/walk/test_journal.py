import json

import pytest
import torch

from fewbit.errors import OutputError, ResumeError
from fewbit.walk.journal import Journal, check_output

PRINT = {"config": "a", "calibration data": "b", "model": "c"}


def block(value):
    tensors = {
        "x.0.q": {"qweight": torch.full((4, 3), value, dtype=torch.int32), "scales": torch.ones(1, 3).half()}
    }
    return tensors, {"x.0.q": {"tokens": value}}


def filled(folder):
    journal = Journal(folder, PRINT)
    for index in range(3):
        tensors, records = block(index)
        name = f"x.{index}.q"
        journal.append(f"x.{index}", {name: tensors["x.0.q"]}, {name: records["x.0.q"]})
    journal.close()


def test_finished_blocks_come_back(tmp_path):
    filled(tmp_path / "out")
    journal = Journal(tmp_path / "out", PRINT)
    assert journal.records == {f"x.{i}.q": {"tokens": i} for i in range(3)}
    assert torch.equal(journal.tensors("x.2.q")["qweight"], torch.full((4, 3), 2, dtype=torch.int32))
    assert journal.notes == []
    journal.remove()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("key", list(PRINT))
def test_other_inputs_are_refused_by_name(tmp_path, key):
    filled(tmp_path)
    with pytest.raises(ResumeError, match=f"another {key}.*choose another folder, or delete"):
        Journal(tmp_path, {**PRINT, key: "changed"})
    Journal(tmp_path, PRINT).close()  # the refusal let go of the lock and changed nothing


def test_no_resume_refuses_an_interrupted_run(tmp_path):
    filled(tmp_path)
    with pytest.raises(ResumeError, match="resuming is switched off"):
        Journal(tmp_path, PRINT, resume=False)


def test_second_process_is_refused(tmp_path):
    first = Journal(tmp_path, PRINT)
    with pytest.raises(OutputError, match="another fewbit process is writing"):
        Journal(tmp_path, PRINT)
    first.close()


def test_every_cut_of_the_journal_file_is_survived(tmp_path):
    filled(tmp_path)
    path = tmp_path / ".fewbit" / "journal"
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        journal = Journal(tmp_path, PRINT)
        complete = data[:length].count(b"\n") - 1
        # A last line that lacks only its line end is whole.
        assert complete <= len(journal.records) <= complete + 1 or (complete < 0 and not journal.records)
        tensors, records = block(7)
        journal.append("x.7", {"x.7.q": tensors["x.0.q"]}, {"x.7.q": records["x.0.q"]})
        journal.close()
        again = Journal(tmp_path, PRINT)
        assert again.records["x.7.q"] == {"tokens": 7}
        again.close()


def test_a_changed_byte_anywhere_drops_only_its_block(tmp_path):
    filled(tmp_path)
    folder = tmp_path / ".fewbit"
    path = folder / "journal"
    first_line = len(path.read_bytes().split(b"\n")[0]) + 1
    targets = [(path, first_line + 40), *((file, 30) for file in sorted(folder.glob("*.safetensors")))]
    for file, position in targets:
        original = file.read_bytes()
        file.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        before = path.read_bytes()
        journal = Journal(tmp_path, PRINT)
        assert len(journal.records) == 2
        assert any("damaged" in note for note in journal.notes)
        journal.close()
        file.write_bytes(original)
        path.write_bytes(before if file != path else original)


def test_a_damaged_first_line_starts_again_with_a_note(tmp_path):
    filled(tmp_path)
    path = tmp_path / ".fewbit" / "journal"
    path.write_bytes(b"0" + path.read_bytes()[1:])
    journal = Journal(tmp_path, PRINT)
    assert journal.records == {}
    assert "first line is damaged" in journal.notes[0]
    journal.close()


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        OutputError, match=r"already holds something else \(thesis.tex\). Nothing was changed"
    ):
        Journal(tmp_path, PRINT)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_as_output_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        check_output(path)


def test_a_full_disk_is_reported_and_keeps_finished_blocks(tmp_path, monkeypatch):
    filled(tmp_path)
    journal = Journal(tmp_path, PRINT)
    tensors, records = block(9)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewbit.walk.journal.os.fsync", full)
    with pytest.raises(
        OutputError, match=r"No space left on device\. Finished blocks are safe: make room and run"
    ):
        journal.append("x.9", tensors, records)
    journal.close()
    monkeypatch.undo()
    again = Journal(tmp_path, PRINT)
    assert len(again.records) == 3
    again.close()


def test_lines_are_plain_json_after_their_checksum(tmp_path):
    filled(tmp_path)
    lines = (tmp_path / ".fewbit" / "journal").read_text().splitlines()
    assert json.loads(lines[0].split(" ", 1)[1])["fingerprint"] == PRINT
    assert json.loads(lines[1].split(" ", 1)[1])["block"] == "x.0"
