"""The journal, and damage to its files."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock
from safetensors import safe_open

from fewbit.atomic_io import temporary_path
from fewbit.errors import OutputError, ResumeError
from fewbit.pipeline.journal import Journal, check_output

PRINT = {"config": "a", "calibration data": "b", "model": "c"}


def block(value):
    tensors = {
        "x.0.q": {"qweight": torch.full((4, 3), value, dtype=torch.int32), "scales": torch.ones(1, 3).half()}
    }
    return tensors, {"x.0.q": {"tokens": value}}


def filled(folder, fingerprint=PRINT):
    journal = Journal(folder, fingerprint)
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


def files_of(folder):
    """The files of the blocks, in the order in which they were written."""
    return sorted((folder / ".fewbit").glob("block-*"))


def run_of(folder):
    return folder / ".fewbit" / "run.json"


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_every_cut_of_a_block_file_is_survived(tmp_path):
    filled(tmp_path)
    path = files_of(tmp_path)[-1]
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        journal = Journal(tmp_path, PRINT)
        assert set(journal.records) == {"x.0.q", "x.1.q"}
        assert journal.notes == [f"the journal's file {path.name} is damaged: its block is done again"]
        tensors, records = block(7)
        journal.append("x.2", {"x.2.q": tensors["x.0.q"]}, {"x.2.q": records["x.0.q"]})
        journal.close()
        again = Journal(tmp_path, PRINT)
        assert again.records["x.2.q"] == {"tokens": 7}
        assert again.notes == []
        again.close()
        files_of(tmp_path)[-1].unlink()


def test_changed_byte_anywhere_drops_only_its_block(tmp_path):
    filled(tmp_path)
    for file in files_of(tmp_path):
        original = file.read_bytes()
        for position in (3, 30, len(original) // 2, len(original) - 1):
            file.write_bytes(flipped(original, position))
            journal = Journal(tmp_path, PRINT)
            assert len(journal.records) == 2
            assert any("damaged" in note for note in journal.notes)
            journal.close()
            file.write_bytes(original)


def test_deleted_block_file_drops_only_its_block(tmp_path):
    filled(tmp_path)
    files_of(tmp_path)[1].unlink()
    journal = Journal(tmp_path, PRINT)
    assert set(journal.records) == {"x.0.q", "x.2.q"}
    journal.append("x.1", *block(9))
    journal.close()
    assert len(files_of(tmp_path)) == 3


@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 200_000, b"[]", b'{"fingerprint": {}}', "flip"])
def test_damaged_fingerprint_is_written_again(tmp_path, damage):
    filled(tmp_path)
    path = run_of(tmp_path)
    before = path.read_bytes()
    path.write_bytes(flipped(before, 30) if damage == "flip" else damage)
    journal = Journal(tmp_path, PRINT)
    assert len(journal.records) == 3
    assert journal.notes == ["the journal's run.json is damaged: it was written again"]
    assert path.read_bytes() == before
    journal.close()


def test_damaged_fingerprint_over_blocks_of_other_inputs_is_refused(tmp_path):
    filled(tmp_path)
    path = run_of(tmp_path)
    path.write_bytes(b"0" + path.read_bytes()[1:])
    before = path.read_bytes()
    with pytest.raises(ResumeError, match=r"run\.json is damaged and no block belongs to a run with these"):
        Journal(tmp_path, {**PRINT, "model": "other"})
    assert path.read_bytes() == before
    assert len(files_of(tmp_path)) == 3


def test_blocks_of_another_run_are_not_taken(tmp_path):
    filled(tmp_path / "a")
    filled(tmp_path / "b", {**PRINT, "calibration data": "other"})
    files_of(tmp_path / "a")[0].unlink()
    foreign = files_of(tmp_path / "b")[0]
    shutil.copy(foreign, tmp_path / "a" / ".fewbit")
    journal = Journal(tmp_path / "a", PRINT)
    assert set(journal.records) == {"x.1.q", "x.2.q"}
    assert journal.notes == [f"the journal's file {foreign.name} is damaged: its block is done again"]
    journal.close()


@pytest.mark.parametrize(
    "about", [None, "", "{", "[]", "7", "{}", '{"run": 7, "layers": {}}', '{"layers": ["x.7.q"]}', "LAYERS"]
)
def test_metadata_of_another_shape_is_damage(tmp_path, about):
    filled(tmp_path)
    journal = Journal(tmp_path, PRINT)
    if about == "LAYERS":
        about = json.dumps({"run": journal._run, "block": "x.7", "layers": {"x.7.q": "done"}})
    journal.close()
    metadata = None if about is None else {"fewbit": about}
    data = safetensors.torch.save({"x": torch.zeros(1)}, metadata=metadata)
    name = f"block-00007-{hashlib.sha256(data).hexdigest()}.safetensors"
    (tmp_path / ".fewbit" / name).write_bytes(data)
    journal = Journal(tmp_path, PRINT)
    assert len(journal.records) == 3
    assert len(journal.notes) == 1
    journal.close()


def test_journal_of_another_form_is_refused(tmp_path):
    filled(tmp_path)
    run_of(tmp_path).write_text(
        json.dumps({"fingerprint": PRINT, "sha256": hashlib.sha256(json.dumps(PRINT).encode()).hexdigest()})
    )
    with pytest.raises(ResumeError, match="made with another form of the journal"):
        Journal(tmp_path, PRINT)


def test_journal_of_an_older_version_is_refused(tmp_path):
    (tmp_path / ".fewbit").mkdir()
    (tmp_path / ".fewbit" / "journal").write_text('0123456789abcdef {"fingerprint": {}}\n')
    for open_it in (check_output, lambda folder: Journal(folder, PRINT)):
        with pytest.raises(ResumeError, match="another form of the journal, of an older version of fewbit"):
            open_it(tmp_path)
    assert [path.name for path in (tmp_path / ".fewbit").iterdir()] == ["journal"]


def test_block_names_do_not_become_paths(tmp_path):
    journal = Journal(tmp_path / "out", PRINT)
    tensors, records = block(1)
    journal.append("../../../escaped", tensors, records)
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = Journal(tmp_path / "out", PRINT)
    assert set(again.records) == {"x.0.q"}
    again.close()


def test_huge_journal_is_refused_unread(tmp_path):
    filled(tmp_path)
    with run_of(tmp_path).open("ab") as file:
        file.truncate(1 << 40)  # takes no room on disk
    with pytest.raises(ResumeError, match=r"bytes are more than fewbit writes\. Delete"):
        Journal(tmp_path, PRINT)


@pytest.mark.parametrize("name", [".fewbit", ".fewbit/run.json"])
def test_links_are_not_followed(tmp_path, name):
    filled(tmp_path / "elsewhere")
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(OutputError, match="is a link; fewbit follows none"):
        Journal(out, PRINT)
    assert len(list((tmp_path / "elsewhere" / ".fewbit").iterdir())) == 5


def test_link_under_a_temporary_name_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    filled(tmp_path / "out")
    journal = Journal(tmp_path / "out", PRINT)
    journal.append("x.9", *block(9))
    path = files_of(tmp_path / "out")[-1]
    path.unlink()
    temporary_path(path).symlink_to(precious)
    journal._next_number -= 1
    journal.append("x.9", *block(9))
    journal.close()
    assert path.is_file()
    assert precious.read_text() == "years of work"


def test_message_if_the_lock_cannot_be_made(tmp_path):
    (tmp_path / ".fewbit" / "lock").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot create .* and lock it: "):
        Journal(tmp_path, PRINT)


def test_message_if_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def none(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    with pytest.raises(OutputError, match="has no locks, so that two runs could mix"):
        Journal(tmp_path, PRINT)


def test_run_that_ended_before_the_lock_was_acquired(tmp_path, monkeypatch):
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
    assert not run_of(tmp_path).exists()


def test_message_if_a_block_file_changes_during_the_run(tmp_path):
    filled(tmp_path)
    journal = Journal(tmp_path, PRINT)
    path = files_of(tmp_path)[1]
    path.write_bytes(b"short")
    with pytest.raises(OutputError, match="Something else changed it; run the same command again"):
        journal.tensors("x.1.q")
    path.unlink()
    with pytest.raises(OutputError, match="Something else changed it; run the same command again"):
        journal.tensors("x.1.q")
    journal.close()


def test_remove_deletes_everything_in_the_journal(tmp_path):
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


def test_message_if_the_journal_cannot_be_removed(tmp_path, monkeypatch):
    filled(tmp_path)
    journal = Journal(tmp_path, PRINT)

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match=r"is complete, but its journal .*not permitted. Delete it"):
        journal.remove()
    monkeypatch.undo()
    journal.close()


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        OutputError, match=r"already holds something else \(thesis.tex\). Nothing was changed"
    ):
        Journal(tmp_path, PRINT)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_as_output_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        check_output(path)


def test_full_disk_keeps_finished_blocks(tmp_path, monkeypatch):
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


def test_fingerprint_and_records_are_plain_json(tmp_path):
    filled(tmp_path)
    assert json.loads(run_of(tmp_path).read_text())["fingerprint"].items() >= PRINT.items()
    with safe_open(files_of(tmp_path)[0], "pt") as file:
        assert json.loads(file.metadata()["fewbit"])["layers"] == {"x.0.q": {"tokens": 0}}
