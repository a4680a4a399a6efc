"""Documents from files, folders and data sets; bad data ends in one clear line."""

import json

import pytest

from kvlab.platform.data import fingerprint, holdout, source
from kvlab.platform.data.documents import DataError, plain


def texts(**given):
    layout = given.pop("layout", "text")
    return ["".join(s.text for s in d) for d in source.documents(given, layout)]


def test_the_python_source_is_large_and_in_a_fixed_order():
    first, second = source.documents({"kind": "python"}), source.documents({"kind": "python"})
    sizes = [sum(len(s.text) for s in d) for d in first]
    assert sizes == [sum(len(s.text) for s in d) for d in second]
    assert sum(sizes) > 6_000_000
    assert len(sizes) > 300


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\ufeff" + "".join(f"Paragraph {i}: " + "wörd " * 200 + "\r\n\n" for i in range(40))
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    pieces = texts(kind="text", path=str(file))
    assert len(pieces) > 5
    assert "".join(pieces) == text[1:]
    assert all(piece.startswith("Paragraph") for piece in pieces)


def test_a_line_without_end_is_cut_too(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x" * 200_000)
    assert [len(p) for p in texts(kind="text", path=str(file))] == [65536, 65536, 65536, 3392]


def test_a_folder_is_read_by_pattern_in_the_order_of_paths(tmp_path):
    for name in ("b.md", "a.md", "sub/c.md", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(kind="folder", path=str(tmp_path), pattern="**/*.md") == [
        "a.md", "b.md", "sub/c.md",
    ]  # fmt: skip
    assert texts(kind="folder", path=str(tmp_path)) == ["d.txt"]


def test_a_local_data_set_is_streamed_through_datasets(tmp_path):
    rows = [{"body": f"row {i}", "n": i} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"body": "held"}))
    given = {"kind": "hub", "name": str(tmp_path), "column": "body"}
    assert texts(**given) == [r["body"] for r in rows]
    assert texts(**given, split="test") == ["held"]
    with pytest.raises(DataError, match=r"row 0: no column 'text'; it has 'body', 'n'"):
        texts(kind="hub", name=str(tmp_path))
    with pytest.raises(DataError, match=r"split valid.*check the name, config and split"):
        texts(**given, split="valid")


def test_a_data_set_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"data set .*nothing") as caught:
        texts(kind="hub", name=str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)


def test_chat_counts_only_what_the_assistant_says(tmp_path):
    file = tmp_path / "chat.jsonl"
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    file.write_text(json.dumps({"messages": turns}) + "\n\n")
    (document,) = source.documents({"kind": "text", "path": str(file)}, "chat")
    assert "".join(s.text for s in document if s.counts) == "4\n"
    assert [s.text for s in document if not s.counts] == [
        "<|system|>\n", "Be brief.\n", "<|user|>\n", "2+2?\n", "<|assistant|>\n",
    ]  # fmt: skip


BAD_ROWS = [
    ("[1]", "line 1: must be an object, found list"),
    ("{", "line 1: not JSON"),
    ('{"text": "x"}', "no column 'messages'; it has 'text'"),
    ('{"messages": []}', "must be a list of"),
    ('{"messages": [{"role": "user"}]}', "message 0 must have text under `role` and `content`"),
    ('{"messages": [{"role": "user", "content": 3}]}', "message 0 must have text"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_bad_chat_rows_name_file_and_line(tmp_path, line, message):
    file = tmp_path / "chat.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=message) as caught:
        texts(kind="text", path=str(file), layout="chat")
    assert str(file) in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"fine\nnot so \xe9\n")
    with pytest.raises(DataError, match=r"not UTF-8 near line [12] .byte 0xe9.*iconv"):
        texts(kind="text", path=str(latin))
    with pytest.raises(DataError, match="there is no such file"):
        texts(kind="text", path=str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="there is no such folder"):
        texts(kind="folder", path=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"no file matches '\*\*/\*\.rst'"):
        texts(kind="folder", path=str(tmp_path), pattern="**/*.rst")
    with pytest.raises(DataError, match="leaves the folder"):
        texts(kind="folder", path=str(tmp_path), pattern="../*")
    with pytest.raises(DataError, match="chat data must be JSONL"):
        texts(kind="text", path=str(latin), layout="chat")
    with pytest.raises(DataError, match="holds no conversations"):
        texts(kind="python", layout="chat")


def test_fingerprints_follow_content_not_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    one, two = ({"kind": "folder", "path": str(tmp_path / name)} for name in ("one", "two"))
    assert fingerprint.source(one) == fingerprint.source(two)
    (tmp_path / "two" / "a.txt").write_text("other")
    assert fingerprint.source(one) != fingerprint.source(two)
    assert fingerprint.source({"kind": "python"}) == fingerprint.source({"kind": "python"})
    named = {"kind": "hub", "name": "someone/something", "split": "train"}
    assert fingerprint.source(named) != fingerprint.source({**named, "revision": "abc"})
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        fingerprint.source({"kind": "text", "path": str(tmp_path / "none.txt")})


def test_holding_out_is_decided_by_content():
    documents = [plain(f"document {i}") for i in range(2000)]
    out = [holdout.held_out(d, 0.1) for d in documents]
    assert 150 < sum(out) < 250
    assert out == [holdout.held_out(plain(f"document {i}"), 0.1) for i in range(2000)]
    assert not any(holdout.held_out(d, 0.0) for d in documents)
