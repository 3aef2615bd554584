"""The journal by itself, and everything that can happen to its files."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from fewbit.errors import OutputError, ResumeError
from fewbit.pipeline.journal import Journal, check_output

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


def journal_of(folder):
    return folder / ".fewbit" / "journal"


def signed(value, run=""):
    """A line whose checksum fits."""
    text = json.dumps(value, sort_keys=True)
    return f"{hashlib.sha256((run + text).encode()).hexdigest()[:16]} {text}\n".encode()


def test_a_damaged_first_line_costs_nothing(tmp_path):
    filled(tmp_path)
    path = journal_of(tmp_path)
    before = path.read_bytes()
    path.write_bytes(b"0" + before[1:])
    journal = Journal(tmp_path, PRINT)
    assert len(journal.records) == 3
    assert journal.notes == ["the journal's first line is damaged: it was written again"]
    assert path.read_bytes() == before
    journal.close()


def test_a_damaged_first_line_over_blocks_of_other_inputs_is_refused(tmp_path):
    filled(tmp_path)
    path = journal_of(tmp_path)
    path.write_bytes(b"0" + path.read_bytes()[1:])
    before = path.read_bytes()
    with pytest.raises(ResumeError, match="first line is damaged and no other belongs to a run with these"):
        Journal(tmp_path, {**PRINT, "model": "other"})
    assert path.read_bytes() == before


def test_lines_of_another_run_are_not_taken(tmp_path):
    filled(tmp_path / "a")
    other = Journal(tmp_path / "b", {**PRINT, "calibration data": "other"})
    tensors, records = block(9)
    other.append("x.0", tensors, records)
    other.close()
    foreign = journal_of(tmp_path / "b").read_bytes().splitlines(keepends=True)[1]
    path = journal_of(tmp_path / "a")
    header, _, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([header, foreign, *rest]))
    for file in (tmp_path / "b" / ".fewbit").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "a" / ".fewbit")
    journal = Journal(tmp_path / "a", PRINT)
    assert set(journal.records) == {"x.1.q", "x.2.q"}
    assert journal.notes == ["1 of 3 blocks in the journal have damaged lines: they are done again"]
    journal.close()


def test_doubled_and_reordered_lines_change_nothing(tmp_path):
    filled(tmp_path)
    path = journal_of(tmp_path)
    header, *blocks = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([header, *reversed(blocks), *blocks]))
    journal = Journal(tmp_path, PRINT)
    assert journal.records == {f"x.{i}.q": {"tokens": i} for i in range(3)}
    assert journal.notes == []
    assert torch.equal(journal.tensors("x.1.q")["qweight"], torch.full((4, 3), 1, dtype=torch.int32))
    journal.close()
    assert len(path.read_bytes().splitlines()) == 4


GOOD = {"block": "x.7", "sha256": "0" * 64, "layers": {"x.7.q": {}}}


@pytest.mark.parametrize(
    "value",
    [
        [],
        7,
        None,
        {},
        {"fingerprint": PRINT},
        {**GOOD, "block": 7},
        {**GOOD, "sha256": None},
        {**GOOD, "layers": ["x.7.q"]},
        {**GOOD, "layers": {"x.7.q": "done"}},
    ],
)
def test_json_of_another_shape_under_a_right_checksum_is_damage(tmp_path, value):
    filled(tmp_path)
    journal = Journal(tmp_path, PRINT)
    run = journal._run
    journal.close()
    with journal_of(tmp_path).open("ab") as file:
        file.write(signed(value, run))
    journal = Journal(tmp_path, PRINT)
    assert len(journal.records) == 3
    assert journal.notes == ["1 of 4 blocks in the journal have damaged lines: they are done again"]
    journal.close()


@pytest.mark.parametrize("value", [{"fingerprint": "x"}, {"block": "x"}, {}])
def test_a_first_line_of_another_shape_under_a_right_checksum_is_refused(tmp_path, value):
    filled(tmp_path)
    journal_of(tmp_path).write_bytes(signed(value))
    with pytest.raises(ResumeError, match=r"its first line has no fingerprint\. Delete"):
        Journal(tmp_path, PRINT)


def test_very_deep_json_is_damage(tmp_path):
    filled(tmp_path)
    text = "[" * 200_000
    with journal_of(tmp_path).open("ab") as file:
        file.write(f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n".encode())
    journal = Journal(tmp_path, PRINT)
    assert len(journal.records) == 3
    journal.close()


def test_a_journal_of_the_form_before_is_refused(tmp_path):
    filled(tmp_path)
    journal_of(tmp_path).write_bytes(signed({"fingerprint": PRINT}))
    with pytest.raises(ResumeError, match="made with another form of the journal"):
        Journal(tmp_path, PRINT)


def test_block_files_have_their_own_names_whatever_a_block_is_called(tmp_path):
    journal = Journal(tmp_path / "out", PRINT)
    tensors, records = block(1)
    journal.append("../../../escaped", tensors, records)
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = Journal(tmp_path / "out", PRINT)
    assert set(again.records) == {"x.0.q"}
    again.close()


def test_a_huge_journal_is_refused_unread(tmp_path):
    filled(tmp_path)
    with journal_of(tmp_path).open("ab") as file:
        file.truncate(1 << 40)  # takes no room on disk
    with pytest.raises(ResumeError, match=r"bytes are more than fewbit writes\. Delete"):
        Journal(tmp_path, PRINT)


@pytest.mark.parametrize("name", [".fewbit", ".fewbit/journal"])
def test_links_are_not_followed(tmp_path, name):
    filled(tmp_path / "elsewhere")
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(OutputError, match="is a link; fewbit follows none"):
        Journal(out, PRINT)
    assert len(list((tmp_path / "elsewhere" / ".fewbit").iterdir())) == 5


def test_a_link_under_a_temporary_name_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    filled(tmp_path / "out")
    journal = Journal(tmp_path / "out", PRINT)
    path = journal._path("x.9")
    path.with_name(path.name + ".tmp").symlink_to(precious)
    journal.append("x.9", *block(9))
    journal.close()
    assert precious.read_text() == "years of work"


def test_a_lock_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / ".fewbit" / "lock").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot create .* and lock it: "):
        Journal(tmp_path, PRINT)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def none(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    with pytest.raises(OutputError, match="has no locks, so that two runs could mix"):
        Journal(tmp_path, PRINT)


def test_a_run_that_ended_before_the_lock_was_free_is_not_begun_again(tmp_path, monkeypatch):
    filled(tmp_path)
    acquire = FileLock.acquire

    def late(lock, *args, **options):
        for path in (tmp_path / ".fewbit").iterdir():
            path.unlink()
        (tmp_path / "config.json").write_text("{}")
        return acquire(lock, *args, **options)

    monkeypatch.setattr("filelock.FileLock.acquire", late)
    with pytest.raises(OutputError, match="already holds something else"):
        Journal(tmp_path, PRINT)
    assert not journal_of(tmp_path).exists()


def test_a_block_file_that_changes_under_the_run_is_said(tmp_path):
    filled(tmp_path)
    journal = Journal(tmp_path, PRINT)
    journal._path("x.1").write_bytes(b"short")
    with pytest.raises(OutputError, match="Something else changed it; run the same command again"):
        journal.tensors("x.1.q")
    journal._path("x.1").unlink()
    with pytest.raises(OutputError, match="Something else changed it; run the same command again"):
        journal.tensors("x.1.q")
    journal.close()


def test_the_finished_journal_is_removed_with_all_that_lies_in_it(tmp_path):
    filled(tmp_path / "out")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    folder = tmp_path / "out" / ".fewbit"
    (folder / "link").symlink_to(tmp_path / "precious")
    (folder / "parts").mkdir()
    (folder / "parts" / "a").touch()
    journal = Journal(tmp_path / "out", PRINT)
    journal.remove()
    assert list((tmp_path / "out").iterdir()) == []
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_a_journal_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    filled(tmp_path)
    journal = Journal(tmp_path, PRINT)

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match=r"is complete, but its journal .*not permitted. Delete it"):
        journal.remove()
    monkeypatch.undo()
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

    monkeypatch.setattr("fewbit.atomic_io.os.fsync", full)
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
    assert json.loads(lines[0].split(" ", 1)[1])["fingerprint"].items() >= PRINT.items()
    assert json.loads(lines[1].split(" ", 1)[1])["block"] == "x.0"
