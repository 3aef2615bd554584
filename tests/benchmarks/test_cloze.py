"""Cloze questions: one right answer, distinct choices, the same questions every time."""

import json

import cloze

LAST = (
    "river",
    "table",
    "window",
    "garden",
    "letter",
    "basket",
    "finger",
    "winter",
    "summer",
    "spring",
    "pocket",
)
FRONT = "a few words stand in front of what is asked for here and there, so there are enough " * 2
TEXT = " ".join(f"{FRONT}{word}." for word in LAST)


def test_every_question_has_one_right_answer():
    found = cloze.questions(TEXT, 8)
    assert found == cloze.questions(TEXT, 8)
    assert len(found) == 8
    for one in found:
        assert len(set(one["choices"])) == cloze.CHOICES
        right = one["choices"][one["answer"]]
        assert f"{one['question']} {right}." in " ".join(TEXT.split())
        assert len(one["question"].split()) == cloze.WORDS_IN_FRONT


def test_tasks_are_files_of_the_harness(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(cloze, "TEXTS", {"one": tmp_path / "text.txt"})
    cloze.write_tasks(tmp_path / "tasks", 5)
    rows = (tmp_path / "tasks/one.jsonl").read_text().splitlines()
    assert json.loads(rows[0]) == cloze.questions(TEXT, 5)[0]
    assert 'doc_to_text: "{{question}}"' in (tmp_path / "tasks/one.yaml").read_text()
