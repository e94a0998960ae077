"""The world of notes under trees, and its base inside the package. What both worlds share is tested with the cups."""

import json
import re
from collections import Counter

import pytest
import torch

from forethought.config import Model, UserError, from_dict, load, to_dict
from forethought.data import worlds
from forethought.data.positions import thought_format
from forethought.data.worlds import load_world, notes
from forethought.eval import started
from forethought.models.loading import EMBEDDED, load_model, load_tokenizer
from helpers.worlds import SPLITS, first_windows, split_thought

TEXT = "oak elm , yew oak , elm ash , ash yew . from yew by oak 2 steps lead to elm ."
PINNED = (
    "fig maple , oak cedar , ash birch , cedar elm , maple ash , birch yew , yew pine , willow fig "
    ", pine oak , elm willow . from birch by yew 6 steps lead to willow ."
)
PINNED_THOUGHTFUL = (
    "elm ash , ash maple , maple elm . from maple by elm 5 <think> maple elm ash maple "
    "elm ash </think> steps lead to ash ."
)


def follow(words: list[str], start: str, steps: int) -> list[str]:
    """A trail found by looking at the words again for each step, and not by the world's own code."""
    trail, told = [start], " ".join(words).split(" . ")[0]
    for _ in range(steps):
        found = re.findall(rf"(?:^|, ){trail[-1]} (\w+)", told)
        if not found:
            break
        trail += found
    return trail


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_where_the_notes_lead(split: str):
    for index in range(500):
        words, _, _ = split_thought(notes.row(split, index)["text"])
        end = words.index(".")
        told, (start, by, second, steps, *fixed, answer, last) = words[: end + 1], words[end + 2 :]
        assert [words[end + 1], by, *fixed, last] == ["from", "by", "steps", "lead", "to", "."]
        assert told[2:-1:3] == [","] * (len(told) // 3 - 1)
        trail = follow(words, start, int(steps))
        assert trail[1] == second and trail[-1] == answer and len(trail) == int(steps) + 1
        assert 5 <= int(steps) <= 6


@pytest.mark.parametrize("split", SPLITS)
def test_the_notes_form_one_ring_of_all_trees_but_in_pretraining_of_some(split: str):
    sizes = Counter()
    for index in range(500):
        words, _, _ = split_thought(notes.row(split, index)["text"])
        told = words[: words.index(".")]
        ring = follow(words, words[0], len(told[0::3]))
        assert ring[-1] == words[0] and set(ring) == set(told[0::3]) == set(told[1::3]) <= set(notes.TREES)
        assert len(set(ring)) == len(ring) - 1 == len(told[0::3])
        sizes[len(set(ring))] += 1
    assert set(sizes) == (set(range(3, 11)) if split == "pretrain" else {10})
    assert sizes[10] / 500 == pytest.approx(0.5 if split == "pretrain" else 1.0, abs=0.07)
    assert min(sizes.values()) > 15


def test_rows_are_the_same_in_every_process_and_release():
    answer = PINNED.rindex(" ", 0, -2) + 1
    assert notes.row("train", 0) == {"id": "notes/train/0/0", "text": PINNED, "marks": {"answer": [answer]}}
    assert notes.row("pretrain", 1)["text"] == PINNED_THOUGHTFUL


def test_held_out_walks_occur_nowhere_else():
    asked = {"pretrain": 2000, "train": 2000, "heldout": 500}
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, count in asked.items():
        for index in range(count):
            words, _, _ = split_thought(notes.row(split, index, seed=index % 2)["text"])
            found[split].add(" ".join(words))
            end = words.index(".")
            told = [(words[i], words[i + 1]) for i in range(0, end, 3)]
            walk = notes.Walk(tuple(told), words[end + 2], int(words[end + 5]))
            assert worlds.held_out(walk) == (split == "heldout")
    assert all(len(texts) > 0.9 * asked[split] for split, texts in found.items())
    assert not found["heldout"] & (found["train"] | found["pretrain"])


def test_vocabulary_holds_exactly_the_words_in_use():
    vocabulary = notes.vocabulary()
    used = {word for i in range(1500) for word in notes.row("pretrain", i)["text"].split(" ")}
    assert used == set(vocabulary)
    assert len(vocabulary) == len(set(vocabulary))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        notes.row("test", 0)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_only_pretraining_documents_hold_thoughts(split: str):
    assert all(worlds.OPEN not in notes.row(split, i)["text"] for i in range(500))


def test_thoughts_are_trails_over_the_notes_told_so_far_or_musings():
    count = Counter()
    musing = {word for phrase in worlds.MUSINGS for word in phrase.split()}
    for index in range(3000):
        words, thought, place = split_thought(notes.row("pretrain", index)["text"])
        if place < 0:
            continue
        kind = "trail" if len(thought) > 1 and set(thought) <= set(notes.TREES) else "musing"
        count[kind] += 1
        if kind == "musing":
            assert set(thought) & musing
            continue
        end = words.index(".")
        start, steps = words[end + 2], int(words[end + 5])
        trail = follow(words[:place], start if place > end + 2 else words[0], steps if place > end + 5 else 6)
        assert thought == trail
        where = "at the answer" if place == len(words) - 2 else "between notes" if place <= end else "behind them"
        count[where] += 1
    assert min(count.values()) > 100 and len(count) == 5, count


def test_a_trail_ends_at_the_answer_where_the_question_is_known():
    shown = 0
    for index in range(1000):
        words, thought, place = split_thought(notes.row("pretrain", index)["text"])
        if place > words.index(".") + 5 and set(thought) <= set(notes.TREES):
            assert thought[-1] == words[-2]
            shown += 1
    assert shown > 100


def test_no_place_of_a_document_gives_the_answer_away():
    hits = Counter()
    for index in range(3000):
        words, _, _ = split_thought(notes.row("train", index)["text"])
        hits.update(at for at, word in enumerate(words[:-2]) if word == words[-2])
        ring = follow(words, words[31], 9)
        hits[f"{ring.index(words[-2])} steps on"] += 1
        hits[f"always {words[-2]}"] += 1
    near = {f"{steps} steps on" for steps in (0, 1, 2, 3, 4, 7, 8, 9)}
    assert not near & set(hits)
    assert max(n for name, n in hits.items() if "steps on" not in str(name)) / 3000 < 0.15, hits.most_common(4)


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        ("yew oak elm", (2, 2)),
        ("<think> yew oak elm </think>", (2, 2)),
        ("yew oak ash", (1, 2)),
        ("oak elm ash", (2, 2)),
        ("yew", (0, 0)),
        ("maybe oak", (0, 0)),
        ("oak or elm", (0, 0)),
        ("hmm oak elm", (1, 1)),
        ("oak : elm", (0, 0)),
        ("fig oak", (0, 1)),
        ("oak fig", (0, 1)),
        ("oak oak", (0, 1)),
        ("", (0, 0)),
        ("</think> <pad> \n\t 1", (0, 0)),
    ],
)
def test_truth_counts_the_statements_of_a_thought(thought: str, expected: tuple[int, int]):
    assert notes.truth(TEXT, thought) == expected


@pytest.mark.parametrize("text", ["", "oak", "oak ,", "the quick brown fox", "from oak by elm 5 steps"])
def test_truth_finds_nothing_checkable_where_there_are_no_notes(text: str):
    assert notes.truth(text, "yew oak elm") == (0, 0)


def test_truth_passes_over_thoughts_in_the_document():
    thoughtful = TEXT.replace("oak elm", "oak <think> fig oak ash . </think> elm")
    assert thoughtful != TEXT
    assert notes.truth(thoughtful, "yew oak elm") == (2, 2)


def test_every_pretraining_trail_is_true():
    made = 0
    for index in range(500):
        text = notes.row("pretrain", index)["text"]
        right, checkable = notes.truth(text, " ".join(split_thought(text)[1]))
        assert right == checkable
        made += checkable
    assert made > 500


def test_the_world_is_listed():
    assert "notes" in worlds.WORLDS
    assert load_world("notes") is notes


def test_the_base_knows_every_word_of_its_world():
    tokenizer = load_tokenizer(Model(path="embedded:notes"))
    config = load("quickstart-notes")
    words = notes.vocabulary()
    encoded = tokenizer(" ".join(words))["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded) == ["<s>", *words]
    thought_format(tokenizer, config.method)
    for window in first_windows(config.corpus, tokenizer, 0, 20):
        assert tokenizer.unk_token_id not in window.tokens and window.marks["answer"] == (39,)
        assert len(window.tokens) == 41


def test_the_base_has_the_architecture_of_that_of_the_cups():
    cups, ours = (json.loads((EMBEDDED[name] / "config.json").read_text()) for name in EMBEDDED)
    assert ours == cups | {"vocab_size": len(notes.vocabulary()) + 3}
    assert all(file.stat().st_size < 2_000_000 for file in EMBEDDED["embedded:notes"].iterdir())


def test_the_base_follows_a_trail_that_it_is_given():
    """It reads and writes worked thoughts; what RLP has to find out is when to write one."""
    model, tokenizer = load_model(Model(path="embedded:notes"), 0), load_tokenizer(Model(path="embedded:notes"))
    right = made = 0
    for index in range(20):
        words = notes.row("heldout", index)["text"].split(" ")
        trail = follow(words, words[31], int(words[34]))
        text = [*words[:-2], worlds.OPEN, *trail, worlds.CLOSE, *words[-2:]]
        tokens = torch.tensor([tokenizer(" ".join(text))["input_ids"]])
        said = tokenizer.convert_ids_to_tokens(model(tokens).logits[0].argmax(-1).tolist())
        # Behind the beginning of text, the word at `i` is followed by what is said at i + 1
        right += sum(said[i + 1] == text[i + 1] for i in range(39, len(text) - 2))
        made += len(text) - 2 - 39
    assert right >= 0.98 * made


def test_an_unknown_base_is_refused():
    with pytest.raises(UserError, match=r"'embedded:zork' cannot be loaded: no such base, .* embedded, embedded:notes"):
        load_model(Model(path="embedded:zork"), 0)


def test_its_configs_differ_from_those_of_the_cups_only_where_the_world_does():
    named = {"run", "model.path", "corpus.path", "evaluate.path"}
    assert differences("quickstart", "quickstart-notes") == named
    assert differences("pretrain-cups", "pretrain-notes") == named | {"train.steps"}


def differences(one: str, other: str) -> set[str]:
    first, second = to_dict(load(one)), to_dict(load(other))
    flat = {(section, name) for section, value in first.items() if isinstance(value, dict) for name in value}
    found = {f"{section}.{name}" for section, name in flat if first[section][name] != second[section][name]}
    return found | {name for name, value in first.items() if not isinstance(value, dict) and value != second[name]}


def test_measuring_the_base_takes_the_options_of_its_quickstart():
    _, config = started("embedded:notes", {}, "evaluate")
    shipped = to_dict(load("quickstart-notes")) | {"run": config.run}
    assert config == from_dict(shipped)
