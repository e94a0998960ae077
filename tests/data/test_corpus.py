"""Documents to windows: every kind of source, every refusal, and a stream that continues bit for bit."""

import contextlib
import gzip
import itertools
import json
import logging
import os
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from forethought.config import Corpus, Notice, UserError
from forethought.data.corpus import Windows, check_corpus, labels, spread_windows, trained_on
from forethought.data.readers import find_source
from forethought.data.worlds import WORLDS, load_world
from helpers.tokenizers import byte_level
from helpers.worlds import first_windows

WORDS = [f"w{number}" for number in range(300)]


def word_level(template: str = "$A") -> PreTrainedTokenizerFast:
    """A token a word, one more for the unknown, and `<s>` where the template has it."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", model_max_length=4)


TOKENIZER = word_level()


def options(path: str | Path, **values: Any) -> Corpus:
    return Corpus(**{"path": str(path), "window": 8, "min_tokens": 2, "shuffle": 0} | values)


def sentence(first: int, length: int = 4) -> str:
    return " ".join(WORDS[(first + i) % len(WORDS)] for i in range(length))


def write_rows(path: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_texts(path: Path, texts: list[str]) -> Path:
    return write_rows(path, [{"text": text} for text in texts])


def ids(windows: list) -> list[str]:
    return labels(windows)


def epochs(windows: Windows, count: int) -> list[list]:
    """The windows of the first `count` epochs."""
    found = [[] for _ in range(count)]
    for window in windows:
        if windows.epoch == count:
            return found
        found[windows.epoch].append(window)
    raise AssertionError("the stream must be endless")


# sources


def pack_zst(data: bytes) -> bytes:
    """One zstd frame, as `zstd FILE` writes it."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": pack_zst}


def content(extension: str, rows: list[dict[str, Any]]) -> bytes:
    """Rows, or for .txt and .md their first text, as a file of this kind."""
    if extension in (".txt", ".md"):
        return rows[0]["text"].encode()
    if extension == ".parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("extension", [".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet"])
def test_a_folder_reads_every_kind_plain_and_compressed(tmp_path: Path, extension: str, packed: str):
    (tmp_path / f"part{extension}{packed}").write_bytes(PACKED[packed](content(extension, ROWS)))
    windows = first_windows(options(tmp_path), TOKENIZER, 0, 10)
    known = ROWS[:1] if extension in (".txt", ".md") else ROWS
    assert [window.tokens for window in windows] == [TOKENIZER(row["text"])["input_ids"] for row in known]
    stream = Windows(options(tmp_path), TOKENIZER, 0)
    next(stream)
    cursor, wanted = stream.cursor(), next(stream)
    again = Windows(options(tmp_path), TOKENIZER, 0)
    again.seek(cursor)
    assert next(again) == wanted


ROWS = [{"text": sentence(3 * i)} for i in range(3)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    "text", [json.dumps(ROWS), "\ufeff" + json.dumps(ROWS, indent=2), "\n".join(map(json.dumps, ROWS))]
)
def test_a_json_file_is_an_array_or_lines(tmp_path: Path, text: str, packed: str):
    path = tmp_path / f"a.json{packed}"
    path.write_bytes(PACKED[packed](text.encode()))
    windows = first_windows(options(path), TOKENIZER, 0, 10)
    assert ids(windows)[0].startswith(f"{path}:")
    assert [window.tokens for window in windows] == [TOKENIZER(row["text"])["input_ids"] for row in ROWS]
    path.write_bytes(PACKED[packed](json.dumps(ROWS[0], indent=1).encode()))
    assert ids(first_windows(options(path), TOKENIZER, 0, 10)) == [f"{path}:1"]
    path.write_bytes(PACKED[packed](b'[{"text": "w0 w1"}, null]'))
    assert late_refusal(options(path)) == f"{path}:2: a row must be an object, got None"


def test_what_a_folder_leaves_out_is_counted_and_named(tmp_path: Path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("README", "a.csv", ".gitattributes"):
        (folder / name).write_text("hello")
    write_texts(folder / "a.jsonl", ["w0 w1"])
    with pytest.warns(UserWarning) as found:
        check_corpus(options(folder))
    assert [str(one.message) for one in found] == [
        f"corpus.path = '{folder}': left out, as no kind of file that is read: 3 (README, a.csv, linked)"
    ]


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("rest", [b"\r\n", b"\n", b"-----END", b"\0" * 512])
def test_bytes_after_an_intact_gzip_are_a_warning(tmp_path: Path, rest: bytes, end: bytes):
    path = tmp_path / "a.jsonl.gz"
    lines = b"\n".join(json.dumps({"text": sentence(i)}).encode() for i in range(5000)) + end
    path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]) + rest)
    padding = not rest.strip(b"\0")  # as tape drives write it; gzip reads it in silence
    with contextlib.nullcontext() if padding else pytest.warns(UserWarning, match="bytes after the end of the packed"):
        assert len(first_windows(options(path), TOKENIZER, 0, 9999)) == 5000


@pytest.mark.parametrize("size", [5, 5000])
@pytest.mark.parametrize("rest", [b"\n", b"-----END OF FILE", b"\0" * 512])
def test_bytes_after_an_intact_zstd_are_a_warning(tmp_path: Path, rest: bytes, size: int):
    path = tmp_path / "a.jsonl.zst"
    lines = b"\n".join(json.dumps({"text": sentence(i)}).encode() for i in range(size))
    path.write_bytes(pack_zst(lines[:99]) + pack_zst(lines[99:]) + rest)
    with pytest.warns(Notice, match="bytes after the end of the packed stream are ignored"):
        assert len(first_windows(options(path), TOKENIZER, 0, 9999)) == size


def test_broken_zstd_is_named(tmp_path: Path):
    path, whole = tmp_path / "a.jsonl.zst", pack_zst(b'{"text": "w0 w1"}\n' * 3)
    for data in (whole[:-3], whole[:4] + b"\xff" * 50, b"plain"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jsonl\.zst:\d: broken or truncated zstd \("):
            first_windows(options(path), TOKENIZER, 0, 10)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"w0 w1")[:-3])
    assert refusal(options(path)).startswith(f"{path}: broken or truncated gzip (")


def test_an_empty_file_of_a_folder_is_skipped(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "c.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jsonl: empty, must hold at least one document"):
        check_corpus(options(tmp_path))
    write_texts(tmp_path / "b.jsonl", ["w0 w1", "w2 w3"])
    for read in (first_windows, spread_windows):
        with pytest.warns(Notice, match=r": 2 files are empty, .*a\.jsonl among them$"):
            check_corpus(options(tmp_path))
            assert len(read(options(tmp_path), TOKENIZER, 0, 2)) == 2


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_a_json_file_over_several_lines_may_begin_anyhow(tmp_path: Path, rows: list[Any]):
    path, text = tmp_path / "a.json", json.dumps(rows[0] if len(rows) == 1 else rows, indent=1)
    path.write_text(text.replace("{\n ", "{").replace("[\n ", "["))
    assert "\n" in path.read_text() or len(rows) == 1
    if len(rows) == 1:
        path.write_text(path.read_text().replace("}", ',\n "id": "x"}'))
    assert len(first_windows(options(path), TOKENIZER, 0, len(rows))) == len(rows)
    path.write_bytes(b'{"text": oops}\n{"text": "w0 w1"}\n')
    assert refusal(options(path)).startswith(f"{path}:1: malformed JSON")
    with pytest.warns(Notice):
        assert ids(first_windows(options(path, skip_bad_rows=True), TOKENIZER, 0, 1)) == [f"{path}:2"]


@pytest.mark.parametrize("field", ["id", "source", "lang"])
def test_a_label_is_one_line_of_text(tmp_path: Path, field: str):
    labelled = {"domain_field": "source", "language_field": "lang"}
    row = {"text": "w0 w1", "source": "a", "lang": "b"}
    for value in ({"name": "x"}, ["x"]):
        path = write_rows(tmp_path / "a.jsonl", [row | {field: value}])
        message = f"{path}:1: field {field!r} must be text or a number, got {value!r}"
        assert refusal(options(path, **labelled)) == message
    known = {"a\n b\x1b[31m": "a b [31m", 3: "3", 2.5: "2.5", " x ": "x", float("nan"): None, "\n": None}
    for value, wanted in known.items():
        path = write_rows(tmp_path / "a.jsonl", [row | {field: value}])
        (window,) = first_windows(options(path, **labelled), TOKENIZER, 0, 1)
        assert {"id": window.id, "source": window.domain, "lang": window.language}[field] == wanted


BAD = [{"text": None}, {"text": {"en": "w0"}}, {"text": ["w0"]}, {"text": 3}, {"body": "w0"}, None, ["w0"]]


@pytest.mark.parametrize("bad", BAD)
def test_bad_rows_are_skipped_and_counted_if_asked(tmp_path: Path, bad: Any):
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, bad, *ROWS, bad])
    assert f"{path}:4: " in late_refusal(options(path))
    stream = Windows(options(path, skip_bad_rows=True), TOKENIZER, 0)
    with pytest.warns(UserWarning, match=r"skips bad rows, the first is .*a\.jsonl:4: "):
        (windows,) = epochs(stream, 1)
    assert ids(windows) == [f"{path}:{n}" for n in (1, 2, 3, 5, 6, 7)]
    assert (stream.documents, stream.bad_rows) == (7, 2)  # the next pass has begun


def test_malformed_lines_and_rows_of_parquet_are_skipped_too(tmp_path: Path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_bytes(b'{"text": "w0 w1"}\n{oops}\n{"text": "caf\xe9"}\n{"text": "w2 w3"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["w0 w1", None, None, "w2 w3"]}), table)
    for path in (lines, table):
        with pytest.warns(UserWarning, match=":2: "):
            windows = first_windows(options(path, skip_bad_rows=True), TOKENIZER, 0, 10)
        assert ids(windows) == [f"{path}:1", f"{path}:4"]


def test_a_corpus_of_bad_rows_says_what_is_wrong_with_them(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [{"doc": {"text": "w0 w1"}}] * 3)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"bad rows: 3, the first is .*:1: no field corpus"):
        next(Windows(options(path, skip_bad_rows=True), TOKENIZER, 0))


@pytest.mark.filterwarnings("ignore:.*skips bad rows")
@pytest.mark.parametrize("shuffle", [0, 1, 4])
def test_every_cursor_resumes_among_bad_rows(tmp_path: Path, shuffle: int):
    path = write_rows(tmp_path / "a.jsonl", [row for i in range(12) for row in ({"text": sentence(i)}, *BAD[: i % 3])])
    corpus = options(path, shuffle=shuffle, skip_bad_rows=True)
    stream = Windows(corpus, TOKENIZER, 0)
    for _ in range(30):
        cursor = stream.cursor()
        again = Windows(corpus, TOKENIZER, 0)
        again.seek(cursor)
        assert next(again) == next(stream)
        assert again.cursor() == stream.cursor()


def test_lone_surrogates_are_named_by_file_and_row(tmp_path: Path):
    for name in ("text", "id", "source", "lang"):
        row = {"text": "w0 w1", "id": 1, "source": "a", "lang": "pl"}
        path = write_rows(tmp_path / "a.jsonl", [row, row | {name: "w \ud800"}])
        corpus = options(path, domain_field="source", language_field="lang")
        assert late_refusal(corpus) == f"{path}:2: field {name!r} contains a lone surrogate"


@pytest.mark.parametrize("name", ["all", "questions", "cost", "minus", "math/answer", "", " ", "domain:x", "post:all",
                                  "<b>x</b>", "a\nb", "\ud800", "../x"])  # fmt: skip
def test_marks_that_other_figures_are_named_after_are_refused(tmp_path: Path, name: str):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "w0 w1", "marks": {name: [3]}}])
    assert refusal(options(path)).startswith(f"{path}:1: marks {name!r}: a name must ")
    assert "\n" not in refusal(options(path))


def test_marks_may_be_words_of_any_language(tmp_path: Path):
    for name in ("answer", "final answer", "odpowiedź", "v1.2_x-y+z", "All"):
        path = write_rows(tmp_path / "a.jsonl", [{"text": "w0 w1", "marks": {name: [3]}}])
        assert first_windows(options(path), TOKENIZER, 0, 1)[0].marks == {name: (1,)}


def test_documents_with_the_same_id_are_different_documents(tmp_path: Path):
    for number, name in enumerate(("books", "code")):
        write_rows(tmp_path / f"{name}.jsonl", [{"id": i, "text": sentence(20 * i + number, 16)} for i in range(10)])
    windows = spread_windows(options(tmp_path), TOKENIZER, 0, 20)
    assert len({window.document for window in windows}) == 20
    assert Counter(window.domain for window in windows) == {"books": 10, "code": 10}
    assert len({window.tokens[0] for window in windows}) > 10
    assert ids(windows)[0] == f"0 ({tmp_path}/books.jsonl:1)" and windows[0].id == "0"


def test_one_id_for_all_rows_does_not_pick_the_same_window_of_each(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [{"id": "wiki", "text": sentence(i, 64)} for i in range(40)])
    windows = spread_windows(options(path), TOKENIZER, 0, 40)
    assert len({window.document for window in windows}) == 40
    assert len({window.start for window in windows}) > 3


def test_given_ids_draw_the_same_windows_as_before(tmp_path: Path):
    rows = [{"id": f"d{i}", "text": sentence(i, 64)} for i in range(6)]
    windows = spread_windows(options(write_rows(tmp_path / "a.jsonl", rows)), TOKENIZER, 0, 6)
    assert [window.start for window in windows] == [40, 24, 40, 32, 32, 48]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str):
    (tmp_path / name).write_text("w0 w1\nw2\n\nw3")
    (window,) = first_windows(options(tmp_path / name), TOKENIZER, 0, 10)
    assert (window.document, window.start, window.tokens) == (str(tmp_path / name), 0, [2, 3, 4, 5])
    assert window.marks == {}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_hold_a_document_each(tmp_path: Path, name: str):
    rows = [{"text": "w0 w1", "id": "first"}, {"id": 7, "text": "w2 w3"}, {"text": "w4 w5", "other": None}]
    path = write_rows(tmp_path / name, rows)
    windows = first_windows(options(path), TOKENIZER, 0, 10)
    assert ids(windows) == ["first", "7", f"{path}:3"]
    assert [window.tokens for window in windows] == [[2, 3], [4, 5], [6, 7]]


def test_blank_lines_hold_nothing_but_count_as_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "w0 w1"}\n\n  \r\n{"text": "w2 w3"}\r\n\n', encoding="utf-8")
    assert ids(first_windows(options(path), TOKENIZER, 0, 10)) == [f"{path}:1", f"{path}:4"]


def test_parquet_rows_are_documents_in_order(tmp_path: Path):
    path, texts = tmp_path / "a.parquet", [sentence(i) for i in range(200)]
    marks = [{"answer": [3]} if i % 2 else None for i in range(200)]
    table = pyarrow.table({"body": texts, "marks": marks, "unused": [0] * 200})
    pyarrow.parquet.write_table(table, path, row_group_size=70)
    windows = first_windows(options(path, field="body"), TOKENIZER, 0, 999)
    assert [window.tokens for window in windows] == [TOKENIZER(text)["input_ids"] for text in texts]
    assert ids(windows)[:2] == [f"{path}:1", f"{path}:2"]
    assert [window.marks for window in windows[:2]] == [{}, {"answer": (1,)}]


def test_rows_name_their_domain_and_language(tmp_path: Path):
    rows = [
        {"text": "w0 w1", "source": " a book ", "lang": "pl"},
        {"text": "w2 w3", "source": None, "lang": ""},
        {"text": "w4 w5", "source": 7, "lang": "en"},
    ]
    wanted = [("a book", "pl"), (None, None), ("7", "en")]
    named = {"domain_field": "source", "language_field": "lang"}
    lines = write_rows(tmp_path / "a.jsonl", rows)
    table = {name: [None if row[name] is None else str(row[name]) for row in rows] for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "b.parquet")
    for path in (lines, tmp_path / "b.parquet"):
        windows = first_windows(options(path, **named), TOKENIZER, 0, 10)
        assert [(window.domain, window.language) for window in windows] == wanted
        unnamed = first_windows(options(path), TOKENIZER, 0, 10)
        assert {(window.domain, window.language) for window in unnamed} == {(None, None)}
        for option in named:
            with pytest.raises(
                UserError, match=rf"no field corpus.{option} = 'missing', the fields are 'text', 'source'"
            ):
                first_windows(options(path, **{**named, option: "missing"}), TOKENIZER, 0, 10)
    # What the rows say goes before the names of the files.
    windows = first_windows(options(tmp_path, domain_field="source"), TOKENIZER, 0, 10)
    assert {window.domain for window in windows} == {"a book", "7", None}


def test_of_several_files_each_is_a_domain(tmp_path: Path):
    names = {
        "books.heldout.jsonl.gz": "books",
        "web-00000-of-00002.jsonl": "web",
        "web-00001-of-00002.jsonl": "web",
        "deep/a.txt": "deep",
        "deep/b.md": "deep",
    }
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_texts(tmp_path / name, ["w0 w1"])
    found = {window.document: window.domain for window in first_windows(options(tmp_path), TOKENIZER, 0, 10)}
    wanted = {f"{tmp_path / name}{':1' if 'json' in name else ''}": domain for name, domain in names.items()}
    assert found == wanted
    (alone,) = first_windows(options(tmp_path / "books.heldout.jsonl.gz"), TOKENIZER, 0, 10)
    assert alone.domain is None


def test_windows_are_spread_over_documents(tmp_path: Path):
    path = write_texts(tmp_path / "a.jsonl", [sentence(0, 40), sentence(50, 8), "w0", sentence(100, 16)])
    one, two, three = (f"{path}:{line}" for line in (1, 2, 4))
    assert ids(spread_windows(options(path), TOKENIZER, 0, 2)) == [one, two]
    assert ids(spread_windows(options(path), TOKENIZER, 0, 3)) == [one, two, three]
    assert ids(spread_windows(options(path), TOKENIZER, 0, 6)) == [one, two, three, one, three, one]
    whole, taken = (load(options(path), TOKENIZER, 0, 99) for load in (spread_windows, first_windows))
    assert sorted((w.document, w.start) for w in whole) == [(w.document, w.start) for w in taken]
    assert whole == spread_windows(options(path), TOKENIZER, 0, 99)
    starts = {spread_windows(options(path), TOKENIZER, seed, 1)[0].start for seed in range(40)}
    assert starts == {0, 8, 16, 24, 32}
    with pytest.raises(UserError, match=r"no document has corpus.min_tokens = 41"):
        spread_windows(options(path, window=64, min_tokens=41), TOKENIZER, 0, 1)


def test_texts_of_one_window_are_spread_as_they_are_taken(tmp_path: Path):
    path = write_texts(tmp_path / "a.jsonl", [sentence(i, 5) for i in range(20)])
    some = options(path, shuffle=4)
    for count in (1, 7, 20, 30):
        assert spread_windows(some, TOKENIZER, 3, count) == first_windows(some, TOKENIZER, 3, count)


def test_a_folder_is_read_deep_and_sorted_without_what_is_hidden_or_unknown(tmp_path: Path):
    for name in ("b/x.txt", "a.jsonl", "c.md", "b/.hidden.txt", ".git/x.txt", "notes.pdf"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        write_texts(path, ["w0 w1"])
    with pytest.warns(UserWarning, match=r"left out, .*: 1 \(notes\.pdf\)$"):
        names = ids(first_windows(options(tmp_path), TOKENIZER, 0, 10))
    assert names == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b/x.txt", f"{tmp_path}/c.md"]


def test_a_glob_picks_files_and_a_file_of_that_very_name_comes_first(tmp_path: Path):
    for name in ("a1.txt", "a2.txt", "b1.txt", "deep/a3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("w0 w1")
    assert [Path(name).name for name in ids(first_windows(options(tmp_path / "a*.txt"), TOKENIZER, 0, 9))] == [
        "a1.txt",
        "a2.txt",
    ]
    assert len(first_windows(options(tmp_path / "**" / "a*.txt"), TOKENIZER, 0, 9)) == 3
    (tmp_path / "a[1].txt").write_text("w5 w6")
    assert [window.tokens for window in first_windows(options(tmp_path / "a[1].txt"), TOKENIZER, 0, 9)] == [[7, 8]]


@pytest.mark.parametrize("pattern", ["**/*.txt", "**/**/*.txt"])
def test_a_file_that_a_glob_finds_by_several_names_is_read_once(tmp_path: Path, pattern: str):
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("w0 w1")
    (tmp_path / "deep" / "loop").symlink_to("..")
    found = find_source(options(tmp_path / pattern), 0, "corpus.path").parts
    assert sorted(Path(name).name for name in found) == ["a.txt", "b.txt", "c.txt"]


def test_a_file_that_is_linked_in_its_folder_is_read_once(tmp_path: Path):
    write_texts(tmp_path / "a.jsonl", ["w0 w1"])
    (tmp_path / "linked.jsonl").symlink_to("a.jsonl")
    assert find_source(options(tmp_path), 0, "corpus.path").parts == [str(tmp_path / "a.jsonl")]


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("w0 w1")
    assert len(first_windows(options("~/a.txt"), TOKENIZER, 0, 9)) == 1


def test_a_world_is_endless_and_its_held_out_side_is_the_same_for_every_seed():
    name, world = WORLDS[0], load_world(WORLDS[0])
    tokenizer = word_level()
    path = f"world:{name}/heldout"
    held_out = [first_windows(options(path, window=512), tokenizer, seed, 5) for seed in (1, 2)]
    assert held_out[0] == held_out[1]
    assert ids(held_out[0]) == [world.row("heldout", index, 0)["id"] for index in range(5)]
    for split in ("train", "pretrain"):
        one, same, other = (first_windows(options(f"world:{name}/{split}"), tokenizer, seed, 50) for seed in (1, 1, 2))
        assert one == same
        assert not set(ids(one)) & set(ids(other))


def test_a_worlds_marks_stand_at_the_marked_word():
    name, world = WORLDS[0], load_world(WORLDS[0])
    row = world.row("heldout", 0, 0)
    (window,) = first_windows(options(f"world:{name}/heldout", window=512), TOKENIZER, 0, 1)
    for mark, offsets in row["marks"].items():
        assert window.marks[mark] == tuple(len(row["text"][:offset].split()) for offset in offsets)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set that `datasets` loads by name of its folder, in two files."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train-0.jsonl", [{"text": sentence(i, 10), "id": f"d{i}"} for i in range(6)])
    write_rows(tmp_path / "data" / "train-1.jsonl", [{"text": sentence(i, 3), "id": f"d{i}"} for i in range(6, 9)])
    return f"hub:{tmp_path}/data"


def test_a_hub_stream_gives_its_rows_shuffles_and_resumes(hub: str):
    check_corpus(options(hub))
    assert list(dict.fromkeys(ids(first_windows(options(hub), TOKENIZER, 0, 99)))) == [f"d{i}" for i in range(9)]
    shuffled = options(hub, shuffle=4)
    stream = Windows(shuffled, TOKENIZER, 1)
    cursors, windows = zip(*((stream.cursor(), next(stream)) for _ in range(32)), strict=True)
    for place in (1, 7, 14, 20):
        again = Windows(shuffled, TOKENIZER, 1)
        again.seek(cursors[place])
        assert list(itertools.islice(again, 32 - place)) == list(windows[place:])


def test_what_the_hub_refuses_is_told_in_one_line(hub: str, tmp_path: Path):
    assert "d0" not in refusal(options(hub, field="body"))
    assert "corpus.field = 'body', the fields are 'text', 'id'" in refusal(options(hub, field="body"))
    assert "Bad split: test. Available splits: ['train']" in refusal(options(hub, split="test"))
    assert refusal(options(f"hub:{tmp_path}/none")).startswith("FileNotFoundError: ")


# refusals


def refusal(corpus: Corpus) -> str:
    """The message with which `check` refuses a corpus."""
    with pytest.raises(UserError) as error:
        check_corpus(corpus, "corpus.path")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"corpus.path = {corpus.path!r}: ")
    return message.split(": ", 1)[1]


def late_refusal(corpus: Corpus) -> str:
    """The message that stops the stream of a corpus whose start is fine."""
    check_corpus(corpus)
    with pytest.raises(UserError) as error:
        first_windows(corpus, TOKENIZER, 0, 99)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"corpus.path = {corpus.path!r}: ")
    return message.split(": ", 1)[1]


KNOWN = ".txt, .md, .jsonl, .ndjson, .json, .parquet, each also .gz or .zst"


def test_paths_that_lead_nowhere(tmp_path: Path):
    assert refusal(options(tmp_path / "none.txt")) == f"no such file or folder ({KNOWN})"
    assert refusal(options(tmp_path / "*.txt")) == f"the glob matches no file ({KNOWN})"
    assert refusal(options(tmp_path)) == f"no file to read in the folder ({KNOWN})"
    (tmp_path / "a.csv").write_text("x")
    expected = f"{tmp_path}/a.csv: unknown extension, must be one of {KNOWN}"
    assert refusal(options(tmp_path / "a.csv")) == expected
    assert refusal(options(tmp_path / "*")) == expected
    assert "File name too long" in refusal(options(f"{tmp_path}/{'a' * 300}.txt"))
    assert refusal(options("a\0b.txt")).startswith("no such file or folder")


def test_the_option_in_the_message_is_the_one_that_was_read(tmp_path: Path):
    corpus = options(tmp_path / "none.txt")
    for ask in (
        lambda: check_corpus(corpus, "evaluate.path"),
        lambda: first_windows(corpus, TOKENIZER, 0, 1, "evaluate.path"),
    ):
        with pytest.raises(UserError, match=r"^evaluate\.path = '.*none.txt': no such file"):
            ask()


def test_worlds_that_do_not_exist():
    known = ", ".join(sorted(WORLDS))
    assert refusal(options("world:nowhere/train")) == f"unknown world 'nowhere', must be one of {known}"
    for path in ("world:cups/validation", "world:cups"):
        message = refusal(options(path))
        assert all(split in message for split in ("pretrain", "train", "heldout"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "{}: empty, must hold at least one document"),
        ("a.jsonl", b"\n \n", "{}: empty, must hold at least one document"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "{}: empty, must hold at least one document"),
        ("a.txt", b"one\ntwo \0 three", "{}:2: holds a NUL byte, so it is binary, not UTF-8 text"),
        ("a.md", "Łódź".encode("utf-16"), "{}:1: holds a NUL byte, so it is binary, not UTF-8 text"),
        ("a.txt", b"one\ntwo\ncaf\xe9", "{}:3: not UTF-8 (byte 0xe9)"),
        ("a.jsonl", b'\n{"text": "caf\xe9"}', "{}:2: not UTF-8 (byte 0xe9)"),
        ("a.jsonl", b'{"text": \0}', "{}:1: holds a NUL byte, so it is binary, not UTF-8 text"),
        (
            "a.jsonl",
            b'{"text": "w0',
            "{}:1: malformed JSON (Unterminated string starting at: line 1 column 10 (char 9))",
        ),
        ("a.jsonl", b"[" * 100_000, "{}:1: malformed JSON (maximum recursion depth exceeded"),
        ("a.jsonl", b'["w0"]', "{}:1: a row must be an object, got ['w0']"),
        ("a.jsonl", b'{"body": "w0", "id": 1}', "{}:1: no field corpus.field = 'text', the fields are 'body', 'id'"),
        ("a.jsonl", b"{}", "{}:1: no field corpus.field = 'text', the fields are none"),
        ("a.jsonl", b'{"text": 3}', "{}:1: field 'text' must be text, got 3"),
        ("a.jsonl", b'{"text": null}', "{}:1: field 'text' must be text, got None"),
        ("a.jsonl", b'{"text": "a \\ud800"}', "{}:1: field 'text' contains a lone surrogate"),
        ("a.jsonl", b'{"text": "a", "marks": [1]}', "{}:1: marks must map names to lists of offsets, got [1]"),
        ("a.jsonl.gz", b'{"text": "w0 w1"}', "{}:1: broken or truncated gzip (Not a gzipped file (b'{\"'))"),
        ("a.parquet", b"PAR1 or not", "{}: cannot be read as parquet ("),
        ("a.parquet", b"", "{}: cannot be read as parquet ("),
    ],
)
def test_a_file_that_is_broken_at_its_start(tmp_path: Path, name: str, data: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(data)
    assert refusal(options(path)).startswith(message.replace("{}", str(path), 1))


@pytest.mark.parametrize("offsets", [3, "1", [5], [-1], [0.0], [True], [[0]], {"a": 1}])
def test_marks_that_are_no_offsets_of_the_text(tmp_path: Path, offsets: Any):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "w0 w1", "marks": {"word": offsets}}])
    expected = f"{path}:1: marks 'word' must list offsets 0 to 4, got {offsets}"
    assert refusal(options(path)).replace("'1'", "1") == expected


@pytest.mark.parametrize("marks", [None, {}, {"word": None}, {"word": []}])
def test_marks_may_be_empty(tmp_path: Path, marks: Any):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "w0 w1", "marks": marks}])
    assert first_windows(options(path), TOKENIZER, 0, 1)[0].marks == {}


def test_a_row_that_is_malformed_later_on_is_named_by_file_and_line(tmp_path: Path):
    good = '{"text": "w0 w1"}\n'
    for name, write in (("a.jsonl", str.encode), ("a.jsonl.gz", lambda text: gzip.compress(text.encode()))):
        path = tmp_path / name
        path.write_bytes(write(good * 3 + "{oops}\n"))
        assert late_refusal(options(path)).startswith(f"{path}:4: malformed JSON (")
        path.write_bytes(write(good * 2 + '{"text": 1}\n'))
        assert late_refusal(options(path)) == f"{path}:3: field 'text' must be text, got 1"


def test_check_reads_the_first_record_of_every_file(tmp_path: Path):
    write_texts(tmp_path / "a.jsonl", ["w0 w1"])
    write_rows(tmp_path / "b.jsonl", [{"text": 0}])
    assert refusal(options(tmp_path)) == f"{tmp_path}/b.jsonl:1: field 'text' must be text, got 0"


def test_a_gzip_that_ends_too_soon(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(f'{{"text": "w{i} w{i * i}"}}\n' for i in range(600)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    check_corpus(options(path))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d{2,3}: broken or truncated gzip \(Compressed file ended"):
        first_windows(options(path), TOKENIZER, 0, 600)
    path.write_bytes(whole[:-8] + b"\0" * 8)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:601: broken or truncated gzip \(CRC check failed"):
        first_windows(options(path), TOKENIZER, 0, 601)


def test_parquet_columns_and_values(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["w0 w1", None], "n": [1, 2]}), path)
    assert refusal(options(path)) == f"{path}: no field corpus.field = 'text', the fields are 'body', 'n'"
    assert refusal(options(path, field="n")) == f"{path}:1: field 'n' must be text, got 1"
    assert late_refusal(options(path, field="body")) == f"{path}:2: field 'body' must be text, got None"
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    assert refusal(options(path, field="body")).startswith(f"{path}: cannot be read as parquet (")


@contextlib.contextmanager
def nobody():
    """Without the rights of the superuser, whom no permission stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "inner").mkdir()
        for file in ("a.txt", "a.jsonl", "a.parquet", "inner/b.txt"):
            (folder / file).write_text("w0 w1")
            (folder / file).chmod(0)
        (folder / "inner").chmod(0)
        try:
            with nobody():
                assert refusal(options(folder / "a.txt")) == f"{folder}/a.txt: Permission denied"
                assert refusal(options(folder / "a.jsonl")) == f"{folder}/a.jsonl: Permission denied"
                assert "Permission denied" in refusal(options(folder / "a.parquet"))
                assert refusal(options(folder)) == f"{folder}/inner: Permission denied"
                assert refusal(options(folder / "inner/b.txt")) == f"{folder}/inner/b.txt: Permission denied"
        finally:
            (folder / "inner").chmod(0o755)


def test_a_pass_without_a_window_ends_in_a_refusal_and_not_in_a_loop(tmp_path: Path):
    path = write_texts(tmp_path / "a.jsonl", [sentence(i, 3) for i in range(5)] + ["", " \n"])
    for shuffle in (0, 2, 100):
        message = late_refusal(options(path, min_tokens=4, shuffle=shuffle))
        assert message == "no document has corpus.min_tokens = 4 tokens or more"
    with pytest.raises(UserError, match=r"no document has corpus.min_tokens = 300 tokens or more"):
        first_windows(options("world:cups/train", window=300, min_tokens=300), TOKENIZER, 0, 1)


# tokens, windows, marks


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    window=st.integers(2, 9),
    least=st.integers(2, 9),
    bos=st.booleans(),
)
def test_windows_concatenate_back_to_the_document_but_for_a_short_end(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], window: int, least: int, bos: bool
):
    tokenizer, least = word_level("<s> $A" if bos else "$A"), min(least, window)
    texts = [sentence(0, window), *(sentence(i, length) for i, length in enumerate(lengths))]
    path = write_texts(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts)
    stream = Windows(options(path, window=window, min_tokens=least), tokenizer, 0)
    (windows,) = epochs(stream, 1)
    skipped = 0
    for line, text in enumerate(texts, start=1):
        whole = tokenizer(text)["input_ids"] if text else []
        assert not whole or whole[0] == 1 or not bos
        pieces = [piece for piece in windows if piece.document == f"{path}:{line}"]
        assert all(piece.tokens[0] == 1 for piece in pieces) or not bos
        together = [token for piece in pieces for token in piece.tokens[bos:]]
        assert together == whole[bos:][: len(together)]
        assert len(whole) - len(together) < least + (not pieces and bos)
        assert [piece.start for piece in pieces] == [index * (window - bos) for index in range(len(pieces))]
        for piece in pieces:
            assert piece.tokens[bos:] == whole[piece.start + bos : piece.start + len(piece.tokens)]
        assert all(least <= len(piece.tokens) <= window for piece in pieces)
        skipped += len(together) < len(whole[bos:]) or not whole
    # The stream went one window into the second epoch to see the end of the first: its first text ends with one word.
    assert stream.documents == len(texts) + 1
    assert stream.skipped == skipped + (bos and least > 2)
    assert stream.tokens == sum(len(piece.tokens) for piece in windows) + window


def test_a_long_document_does_not_set_off_the_tokenizers_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = word_level()
    path = write_rows(tmp_path / "a.jsonl", [{"text": sentence(0, 50)}, {"text": sentence(0, 50), "marks": {"a": [0]}}])
    logger = logging.getLogger("transformers")
    before, level = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel(logging.WARNING)  # the command line, used by other tests, keeps this library quiet
    try:
        assert len(first_windows(options(path), tokenizer, 0, 99)) == 14
        assert not caplog.records
        tokenizer(sentence(0, 50))
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.propagate = before
        logger.setLevel(level)


def test_marks_fall_into_the_window_that_holds_their_token(tmp_path: Path):
    text = sentence(0, 20)
    starts = list(itertools.accumulate((len(word) + 1 for word in text.split()), initial=0))
    marks = {
        "some": [starts[i] for i in (18, 0, 19, 8, 6)],
        "inside": [starts[10] + 2, starts[10]],
        "space": [starts[5] - 1],
    }
    path = write_rows(tmp_path / "a.jsonl", [{"text": text, "marks": marks}])
    for template in ("$A", "<s> $A <s>"):
        windows = first_windows(options(path), word_level(template), 0, 9)
        found = {
            name: [window.start + index for window in windows for index in window.marks.get(name, ())] for name in marks
        }
        shift = int(template != "$A")
        expected = {"some": [0, 6, 8, 18, 19], "inside": [10], "space": [5]}
        assert found == {name: [index + shift for index in indices] for name, indices in expected.items()}
        assert all(window.marks[name] for window in windows for name in window.marks)
        assert all(
            0 <= index < len(window.tokens) for window in windows for at in window.marks.values() for index in at
        )


def test_special_tokens_on_either_side_take_no_mark(tmp_path: Path):
    texts = [sentence(100, length) for length in range(1, 10)]
    rows = [{"text": text, "marks": {"every": [5 * word for word in range(len(text.split()))]}} for text in texts]
    path = write_rows(tmp_path / "a.jsonl", rows)
    windows = first_windows(options(path, window=64), word_level("<s> $A <s>"), 0, 99)
    assert [window.marks["every"] for window in windows] == [tuple(range(1, length + 1)) for length in range(1, 10)]


@pytest.mark.parametrize("trim", [True, False])
def test_marks_land_on_the_token_that_holds_the_character_in_byte_level_bpe(tmp_path: Path, trim: bool):
    text = "the theory — żółw 🐢 then thaws; the other thing"
    tokenizer = byte_level(["the the then thing other theory"], trim)
    places = [index for index, letter in enumerate(text) if letter != " "]
    rows = [{"text": text, "marks": {"here": [place]}} for place in places]
    path = write_rows(tmp_path / "a.jsonl", rows)
    windows = first_windows(options(path, window=256), tokenizer, 0, 999)
    assert len(windows) == len(places)
    several = 0
    for place, window in zip(places, windows, strict=True):
        (index,) = window.marks["here"]
        # Bytes before the marked token end at or before the character, bytes up to its end reach into it.
        before, after = (sum(token_bytes(tokenizer, t) for t in window.tokens[:end]) for end in (index, index + 1))
        start, end = (len(text[:edge].encode()) for edge in (place, place + 1))
        assert before <= start < after
        several += after < end
    assert several > 0


@pytest.mark.parametrize("legacy", [True, False])
def test_the_space_that_sentencepiece_puts_before_a_text_takes_no_mark(tmp_path: Path, legacy: bool):
    letters = "\u2581(wz"
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    if legacy:
        plain.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        plain.pre_tokenizer = pre_tokenizers.Metaspace()
    rows = [{"text": "(w z", "marks": {"first": [0], "space": [2], "last": [3]}}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    [window] = first_windows(options(path), PreTrainedTokenizerFast(tokenizer_object=plain), 0, 1)
    assert window.tokens == [0, 1, 2, 0, 3]
    assert window.marks == {"first": (1,), "space": (3,), "last": (4,)}


def token_bytes(tokenizer: PreTrainedTokenizerFast, token: int) -> int:
    """Bytes of a byte-level token: it spells each with one letter."""
    return len(tokenizer.convert_ids_to_tokens(token))


class SlowTokenizer(PreTrainedTokenizer):
    """Splits at spaces in Python, so it knows no offsets."""

    @property
    def vocab_size(self) -> int:
        return len(WORDS)

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(WORDS)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return WORDS.index(token)


def test_a_tokenizer_without_offsets_serves_documents_without_marks(tmp_path: Path):
    rows = [{"text": "w1 w2", "id": "plain"}, {"text": "w3 w4", "id": "marked", "marks": {"a": [0]}}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert first_windows(options(path), SlowTokenizer(), 0, 1)[0].tokens == [1, 2]
    with pytest.raises(
        UserError, match=r"model\.tokenizer: the marks of .*a\.jsonl:2 need a fast tokenizer, got SlowTokenizer"
    ):
        first_windows(options(path), SlowTokenizer(), 0, 2)


# order


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files of 1 to 13 rows, documents of 0 to 21 tokens."""
    lengths = itertools.cycle([9, 3, 21, 0, 16, 1, 5])
    for file, length in enumerate([7, 1, 13, 2, 10]):
        suffix = ".jsonl.gz" if file == 2 else ".jsonl"
        rows = [{"text": sentence(file * 31 + row, next(lengths)), "id": f"{file}.{row}"} for row in range(length)]
        write_rows(tmp_path / f"{file}{suffix}", rows)
    (tmp_path / "5.txt").write_text(sentence(200, 18))
    return tmp_path


def test_order_without_shuffling_is_that_of_the_corpus(folder: Path):
    first, second = epochs(Windows(options(folder), TOKENIZER, 0), 2)
    assert first == second
    names = list(dict.fromkeys(ids(first)))
    assert names == sorted(names, key=lambda name: [float("inf")] if "/" in name else [*map(int, name.split("."))])


@pytest.mark.parametrize("shuffle", [1, 4, 1000])
def test_shuffling_permutes_and_depends_on_seed_and_epoch(folder: Path, shuffle: int):
    plain = epochs(Windows(options(folder), TOKENIZER, 0), 1)[0]
    corpus = options(folder, shuffle=shuffle)
    orders = [order for seed in (0, 1) for order in epochs(Windows(corpus, TOKENIZER, seed), 3)]
    for order in orders:
        assert Counter(map(repr, order)) == Counter(map(repr, plain))
    assert len({tuple(map(repr, order)) for order in [plain, *orders]}) == 7
    assert orders[:3] == epochs(Windows(corpus, TOKENIZER, 0), 3)
    assert first_windows(corpus, TOKENIZER, 1, 5) == orders[3][:5]
    assert first_windows(corpus, TOKENIZER, 1, 10**6) == orders[3]


def test_a_block_is_all_that_is_shuffled_and_each_has_its_own_order(tmp_path: Path):
    path = write_texts(tmp_path / "a.jsonl", [sentence(i, 2) for i in range(24)])
    orders = [order for seed in (0, 1) for order in epochs(Windows(options(path, shuffle=8), TOKENIZER, seed), 2)]
    lines = [int(name.rsplit(":", 1)[1]) - 1 for order in orders for name in ids(order)]
    blocks = [lines[start : start + 8] for start in range(0, len(lines), 8)]
    assert all(sorted(block) == list(range(n % 3 * 8, n % 3 * 8 + 8)) for n, block in enumerate(blocks))
    permutations = {tuple(line % 8 for line in block) for block in blocks}
    assert len(permutations | {tuple(range(8))}) == 2 * 2 * 3 + 1


@pytest.mark.parametrize("shuffle", [0, 16])
def test_held_out_text_is_spread_over_files(tmp_path: Path, shuffle: int):
    for number, (name, count) in enumerate({"books": 30, "code": 3, "short": 4, "web": 30}.items()):
        length = 1 if name == "short" else 12
        write_texts(tmp_path / f"{name}.jsonl", [sentence(40 * number + i, length) for i in range(count)])
    windows = spread_windows(options(tmp_path, shuffle=shuffle), TOKENIZER, 0, 21)
    assert Counter(window.domain for window in windows) == {"books": 9, "code": 3, "web": 9}
    assert windows == spread_windows(options(tmp_path, shuffle=shuffle), TOKENIZER, 0, 21)
    assert len(spread_windows(options(tmp_path, shuffle=shuffle), TOKENIZER, 0, 999)) == 2 * 63
    with pytest.raises(UserError, match=r"no document has corpus\.min_tokens = 8 tokens or more"):
        spread_windows(options(tmp_path / "s*.jsonl", shuffle=shuffle, min_tokens=8), TOKENIZER, 0, 21)


@pytest.mark.parametrize("shuffle", [0, 16])
def test_of_many_files_held_out_text_is_not_the_first_ones(tmp_path: Path, shuffle: int):
    for number in range(60):
        (tmp_path / f"{number // 30}").mkdir(exist_ok=True)
        (tmp_path / f"{number // 30}" / f"{number}.txt").write_text(sentence(number, 4))
    windows = spread_windows(options(tmp_path, shuffle=shuffle), TOKENIZER, 0, 20)
    assert len(windows) == 20
    assert min(Counter(window.domain for window in windows).values()) > 5


def test_a_shuffled_stream_reads_files_in_turn(tmp_path: Path):
    for number, name in enumerate(("books", "code", "web")):
        write_texts(tmp_path / f"{name}.jsonl", [sentence(50 * number + i, 4) for i in range(40)])
    windows = first_windows(options(tmp_path, shuffle=9), TOKENIZER, 0, 36)
    for start in range(0, 36, 9):
        block = Counter(window.domain for window in windows[start : start + 9])
        assert block == {"books": 3, "code": 3, "web": 3}


# resuming


def assert_resumes(corpus: Corpus, seed: int, length: int) -> None:
    """From every cursor of a stream, through JSON, windows, counters and later cursors continue as they did."""

    def state(stream: Windows) -> tuple:
        return stream.cursor(), stream.epoch, stream.documents, stream.skipped, stream.tokens

    stream = Windows(corpus, TOKENIZER, seed)
    states, windows = [state(stream)], []
    for _ in range(length):
        windows.append(next(stream))
        states.append(state(stream))
    for place, (cursor, *_) in enumerate(states):
        again = Windows(corpus, TOKENIZER, seed)
        next(again)
        again.seek(json.loads(json.dumps(cursor)))
        assert state(again) == states[place]
        for index in range(place, length):
            assert next(again) == windows[index]
            assert state(again) == states[index + 1]


@pytest.mark.parametrize("shuffle", [0, 1, 4, 64])
def test_every_cursor_resumes_bit_for_bit_across_files_and_epochs(folder: Path, shuffle: int):
    corpus = options(folder, shuffle=shuffle)
    length = len(epochs(Windows(corpus, TOKENIZER, 2), 1)[0]) + 3
    assert_resumes(corpus, 2, length)


def test_every_cursor_of_a_parquet_file_resumes(tmp_path: Path):
    texts = [sentence(i, i % 19) for i in range(150)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=40)
    corpus = options(tmp_path, shuffle=20)
    stream = Windows(corpus, TOKENIZER, 0)
    cursors, windows = zip(*((stream.cursor(), next(stream)) for _ in range(400)), strict=True)
    assert stream.epoch > 0
    for place in range(0, 370, 7):
        again = Windows(corpus, TOKENIZER, 0)
        again.seek(cursors[place])
        assert list(itertools.islice(again, 30)) == list(windows[place : place + 30])


def test_every_cursor_of_a_world_resumes():
    assert_resumes(options("world:cups/train", window=16, min_tokens=4), 1, 30)


@settings(max_examples=10, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6), min_size=1, max_size=4),
    shuffle=st.integers(0, 7),
    seed=st.integers(0, 3),
    least=st.integers(2, 8),
)
def test_any_corpus_resumes(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], shuffle: int, seed: int, least: int
):
    folder = tmp_path_factory.mktemp("corpus")
    files[0].append(9)
    for file, lengths in enumerate(files):
        write_texts(folder / f"{file}.jsonl", [sentence(file + i, length) for i, length in enumerate(lengths)])
    assert_resumes(options(folder, shuffle=shuffle, min_tokens=least), seed, 12)


def test_a_cursor_of_another_number_of_files_is_refused(folder: Path):
    stream = Windows(options(folder), TOKENIZER, 0)
    next(stream)
    cursor = stream.cursor()
    (folder / "new.txt").write_text("w0 w1")
    with pytest.raises(UserError, match="7 files, but 6 when the run was saved"):
        Windows(options(folder), TOKENIZER, 0).seek(cursor)


@pytest.mark.parametrize("place", [0, 70_000, 150_000, -3])
def test_an_edit_of_the_same_size_is_noticed(tmp_path: Path, place: int):
    path = write_texts(tmp_path / "a.jsonl", [sentence(i, 20) for i in range(2000)])
    write_texts(tmp_path / "b.jsonl", [sentence(0, 20)])
    cursor = Windows(options(tmp_path), TOKENIZER, 0).cursor()
    data = bytearray(path.read_bytes())
    assert len(data) > 180_000
    data[place] ^= 1
    path.write_bytes(data)
    assert Windows(options(tmp_path), TOKENIZER, 0).changed(cursor) == [str(path)]


def test_held_out_files_of_the_corpus_are_found(tmp_path: Path):
    for name in ("train/a.jsonl", "train/b.jsonl", "other/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_texts(tmp_path / name, ["w0 w1"])
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "train" / "b.jsonl")
    corpus = options(tmp_path / "train")
    assert trained_on(corpus, str(tmp_path / "other")) == []
    assert trained_on(corpus, str(tmp_path / "linked.jsonl")) == [str(tmp_path / "linked.jsonl")]
    assert trained_on(corpus, str(tmp_path / "train" / "*a*")) == [str(tmp_path / "train" / "a.jsonl")]
    assert trained_on(options("world:cups/train"), "world:cups/train") == ["world:cups/train"]
    assert trained_on(options("world:cups/train"), "world:cups/heldout") == []


def test_resuming_tokenizes_only_from_the_present_document_on(tmp_path: Path):
    class Counting(PreTrainedTokenizerFast):
        seen = 0

        def __call__(self, *texts: Any, **values: Any) -> Any:
            Counting.seen += 1
            return super().__call__(*texts, **values)

    path = write_texts(tmp_path / "a.jsonl", [sentence(i, 12) for i in range(40)])
    stream = Windows(options(path, shuffle=16), TOKENIZER, 0)
    for _ in range(2 * 30 + 1):
        next(stream)
    again = Windows(options(path, shuffle=16), Counting(tokenizer_object=TOKENIZER.backend_tokenizer), 0)
    again.seek(stream.cursor())
    assert Counting.seen == 0
    assert [next(again) for _ in range(3)] == [next(stream) for _ in range(3)]
    assert Counting.seen == 2


# memory


@pytest.mark.parametrize("shuffle", [0, 1, 8])
def test_reading_runs_ahead_by_no_more_than_a_block(tmp_path: Path, shuffle: int):
    """What lies beyond the block is malformed, and is not noticed before the block is given out."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w0 w1"}\n' * 32 + "{oops}\n")
    stream = Windows(options(path, shuffle=shuffle), TOKENIZER, 0)
    assert len(list(itertools.islice(stream, 32))) == 32
    with pytest.raises(UserError, match=r"a\.jsonl:33: malformed JSON"):
        next(stream)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_memory_stays_at_one_block(tmp_path: Path, name: str):
    """400 documents of 50 kB are read while never more than a block of 10 (0.5 MB) and a little is held."""
    path = tmp_path / name
    write_texts(path, [f"w{i % 300} {'x' * 50_000}" for i in range(400)])
    stream = Windows(options(path, shuffle=10), TOKENIZER, 0)
    next(stream)
    tracemalloc.start()
    try:
        assert sum(1 for _ in itertools.islice(stream, 399)) == 399
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.95e6
