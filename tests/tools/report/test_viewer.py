"""The thought viewer: what the page's data holds, that text cannot become markup, and the script in a real browser."""

import base64
import hashlib
import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from forethought.config import UserError
from forethought.tools.report import runs as run_folders
from forethought.tools.report import viewer, write
from helpers.pages import BROWSER, HOSTILE, Page, make_run

SHOWN = HOSTILE.replace("\x00", "⟨U+0000⟩").replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")


def thought(evidence: float | None, text: str = "hmm let me see", **more) -> dict:
    reward = None if evidence is None else evidence + 1.0
    row = {"text": text, "length": 4, "closed": True, "evidence": evidence, "reward": reward, "advantage": 0.25}
    return row | {"top": [["red", 0.5], ["blue", 0.25]]} | more


def place(at: int, target: str, *evidence: float | None, **more) -> dict:
    thoughts = [thought(value) for value in evidence]
    return {"at": at, "target": target, "nothink": -1.0, "nothink_top": [["red", 0.4]], "thoughts": thoughts} | more


def document(name: str, *positions: dict, tokens: tuple[str, ...] = ("now", "under", "red", "."), **more) -> dict:
    return {"document": name, "domain": "cups", "tokens": list(tokens), "positions": list(positions)} | more


def documents(*rows: dict) -> dict:
    return {"version": 1, "model": "runs/rlp/policy", "documents": list(rows)}


def with_documents(run: Path, value: object) -> Path:
    (run / "documents.json").write_text(json.dumps(value))
    return run


def hostile() -> dict:
    row = thought(
        -0.5, f"</script>{HOSTILE}<!--<script>", top=[[HOSTILE, 0.5], ["</script><script>alert(1)</script>", 0.2]]
    )
    tokens = ("<img src=x onerror=alert(1)>", HOSTILE, "\n</script>\u2028", "{{ 7 * 7 }}")
    position = place(1, HOSTILE, nothink_top=[[HOSTILE, 0.3]], thoughts=[row])
    return documents(document(HOSTILE, position, tokens=tokens, domain=HOSTILE)) | {"model": HOSTILE}


def data(page: Path) -> dict:
    html = page.read_text(encoding="utf-8")
    [found] = re.findall(r'<script type="application/json" id="viewer-data">(.*?)</script>', html, flags=re.DOTALL)
    assert not re.search("[<>&]", found)
    return json.loads(found)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Two runs that share one document; the second run has another one besides."""
    folder = tmp_path_factory.mktemp("viewer")
    shared = document("a", place(2, "red", -0.5, -0.25, -0.75), place(1, "under", -1.5))
    base = with_documents(make_run(folder / "base", steps=2), documents(shared))
    better = document("a", place(2, "red", -0.1))
    other = document("b", place(3, ".", -0.9), domain=None)
    return write([base, with_documents(make_run(folder / "rlp", steps=2), documents(better, other))])


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Path:
    return write([with_documents(make_run(tmp_path_factory.mktemp("evil") / "run", steps=2), hostile())])


def test_data_holds_each_document_once_with_a_version_for_each_run(two):
    found = data(two)
    assert found["runs"] == [{"name": name, "model": "runs/rlp/policy"} for name in ("base", "rlp")]
    assert [(one["title"], one["domain"], list(one["versions"])) for one in found["documents"]] == [
        ("a", "cups", ["0", "1"]),
        ("b", None, ["1"]),
    ]
    version = found["documents"][0]["versions"]["0"]
    assert version["spaced"]
    assert version["tokens"] == ["now", "under", "red", "."]
    assert [one["at"] for one in version["positions"]] == [1, 2]
    red = version["positions"][1]
    assert (red["target"], red["nothink"], red["gain"], red["top"]) == ("red", -1.0, 0.5, [["red", 0.4]])
    assert [one["evidence"] for one in red["thoughts"]] == [-0.25, -0.5, -0.75], "best reward first"
    assert red["thoughts"][0] == {
        "text": "hmm let me see", "length": 4, "closed": True, "evidence": -0.25, "reward": 0.75, "advantage": 0.25,
        "top": [["red", 0.5], ["blue", 0.25]],
    }  # fmt: skip
    assert found["documents"][0]["versions"]["1"]["positions"][0]["gain"] == pytest.approx(0.9)
    assert found["limit"] == 1.0


def test_section_and_its_link_wait_for_the_script(two):
    tags = Page(two.read_text(encoding="utf-8")).tags
    hidden = {attrs["id"] for _, attrs in tags if "hidden" in attrs and "id" in attrs}
    assert {"viewer", "viewer-link"} <= hidden
    assert "Documents measured token by token." in two.read_text(encoding="utf-8")


def test_only_this_script_may_run_and_it_fetches_nothing(two):
    html = two.read_text(encoding="utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    policy = next(attrs["content"] for tag, attrs in Page(html).tags if attrs.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    for word in ("fetch(", "XMLHttpRequest", "import(", "WebSocket", "http:", "https:", "innerHTML", "eval(", "src="):
        assert word not in script, word
    assert not re.findall(r"""(?:src|href|action)=["'](?!#)""", html)


def test_hostile_text_stays_text(evil):
    html = evil.read_text(encoding="utf-8")
    page = Page(html)
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "b", "iframe")] == ["script", "script"]
    assert html.count("</script>") == 2
    version = data(evil)["documents"][0]["versions"]["0"]
    assert not version["spaced"]
    assert version["tokens"] == ["<img src=x onerror=alert(1)>", SHOWN, "\n</script>⟨U+2028⟩", "{{ 7 * 7 }}"]
    assert version["positions"][0]["thoughts"][0]["text"] == f"</script>{SHOWN}<!--<script>"


def test_without_documents_the_logged_thoughts_are_shown(tmp_path):
    page = write([make_run(tmp_path / "run", steps=3)])
    found = data(page)
    assert found["runs"] == [{"name": "run", "model": None}]
    logged = run_folders.load(tmp_path / "run", "run").positions
    assert [one["domain"] for one in found["documents"]] == [f"step {one.step}" for one in logged]
    first = found["documents"][0]["versions"]["0"]
    assert first["tokens"][1] == first["positions"][0]["target"] == " black"
    assert not first["spaced"]
    mean = sum(one.evidence for one in logged[0].thoughts if one.evidence is not None) / 8
    assert first["positions"][0]["gain"] == pytest.approx(mean + 1.609)
    assert "Positions logged during training" in page.read_text(encoding="utf-8")


def test_without_thoughts_there_is_neither_viewer_nor_script(tmp_path):
    html = write([make_run(tmp_path / "cpt", "cpt", steps=3)]).read_text(encoding="utf-8")
    assert "<script" not in html
    assert 'id="viewer' not in html
    assert "default-src 'none'; style-src 'unsafe-inline'\"" in html


def test_runs_without_anything_to_show_take_no_place(tmp_path):
    cpt, rlp = make_run(tmp_path / "cpt", "cpt", steps=2), make_run(tmp_path / "rlp", steps=2)
    found = data(write([cpt, rlp]))
    assert [one["name"] for one in found["runs"]] == ["rlp"]
    assert list(found["documents"][0]["versions"]) == ["0"]


def test_missing_figures_are_left_open(tmp_path):
    bare = {
        "at": 0,
        "target": "now",
        "nothink": math.nan,
        "nothink_top": None,
        "thoughts": [{"text": "x", "closed": False}],
    }
    run = with_documents(make_run(tmp_path / "run", steps=1), documents(document("a", bare, place(2, "red", None))))
    [first, second] = data(write([run]))["documents"][0]["versions"]["0"]["positions"]
    assert (first["gain"], first["nothink"], first["top"], second["gain"]) == (None, None, [], None)
    assert first["thoughts"][0]["length"] is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"top level: "),
        (documents() | {"version": 2}, r"version: Input should be 1"),
        (documents(document("a", {"target": "x"})), r"documents\.0\.positions\.0\.at: Field required"),
        (documents(document("a", place(4, "x"))), r"document 'a': positions must have different tokens, from 0 to 3"),
        (documents(document("a", place(1, "x"), place(1, "x"))), r"positions must have different tokens"),
        (documents(document("a", place(1, "x", nothink_top=[["y", 1.5]]))), r"less than or equal to 1"),
        (documents(document("a") | {"tokens": "now"}), r"documents\.0\.tokens: Input should be a valid list"),
    ],
)
def test_broken_documents_are_one_line(tmp_path, value, message):
    run = with_documents(make_run(tmp_path / "run", steps=1), value)
    with pytest.raises(UserError, match=rf"documents\.json: {message}|{message}") as caught:
        write([run])
    assert "\n" not in str(caught.value)
    assert "documents.json" in str(caught.value)


def test_file_that_is_no_json_is_one_line(tmp_path):
    (tmp_path / "documents.json").write_text('{"version": 1, ')
    with pytest.raises(UserError, match=r"documents\.json: is not valid JSON"):
        viewer.load(tmp_path)
    (tmp_path / "documents.json").unlink()
    assert viewer.load(tmp_path) is None


def dump(page: Path, address: str, folder: Path) -> Page:
    """The page as a browser has made it, at an address such as #viewer/0/1/2/open."""
    assert BROWSER is not None
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
    words += ["--window-size=1200,900", "--virtual-time-budget=3000", "--dump-dom", page.as_uri() + address]
    return Page(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_browser_opens_the_position_that_the_address_names(two, evil, tmp_path):
    page = dump(two, "#viewer/0/1/2/open", tmp_path)
    shown = {attrs["id"]: attrs for _, attrs in page.tags if "id" in attrs}
    assert all("hidden" not in shown[name] for name in ("viewer", "viewer-link", "viewer-panel"))
    chosen = [attrs for _, attrs in page.tags if "chosen" in (attrs.get("class") or "")]
    assert [one["aria-label"] for one in chosen] == ["red, gain +0.900 nats, thoughts help, position 1 of 1"]
    assert "▲ +0.900 nats" in page.text
    assert "Its log p is −1.000 without a thought and −0.100 after one" in page.text
    assert all("open" not in attrs for tag, attrs in page.tags if tag == "details" and attrs.get("class") == "step")
    text = dump(evil, "#viewer/0/0/1/open", tmp_path)
    assert {tag for tag, _ in text.tags}.isdisjoint({"img", "b", "iframe"})
    assert SHOWN.replace(" ", "␣") in text.text
