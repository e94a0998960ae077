import random
from collections import Counter

import pytest

from forethought.data import worlds
from forethought.data.worlds import cups, load_world, notes
from helpers.worlds import SPLITS, split_thought

TRACK = "1 blue 2 blue 3 black"
PINNED = (
    "ball under red . swap 1 blue red , 2 red white , 3 blue red , 4 white green "
    ", 5 black blue , 6 black green , 7 red blue , 8 black blue . now under black ."
)
PINNED_THOUGHTFUL = (
    "ball under blue . swap 1 green black , 2 black blue <think> 1 blue </think> , 3 green red "
    ", 4 green red , 5 red black , 6 blue white , 7 white red . now under white ."
)
TEXT = "ball under red . swap 1 blue red , 2 green white , 3 black blue . now under black ."


def simulate(words: list[str]) -> list[str]:
    """Where the ball is after each move, found by moving five labelled cups and not by the world's own code."""
    table = {colour: colour == words[2] for colour in cups.COLORS}
    moves = " ".join(words[5 : words.index("now") - 1]).split(" , ")
    found = []
    for number, move in enumerate(moves, start=1):
        said, one, other = move.split(" ")
        assert said == str(number)
        assert one != other
        table[one], table[other] = table[other], table[one]
        found += [colour for colour, holds in table.items() if holds]
    assert len(found) == len(moves)
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_where_the_ball_ends(split):
    for index in range(500):
        row = cups.row(split, index)
        words, _, _ = split_thought(row["text"])
        assert words[-2] == simulate(words)[-1]
        assert words[:2] == ["ball", "under"] and words[3:5] == [".", "swap"]
        assert words[-5:-2] == [".", "now", "under"] and words[-1] == "."
        assert cups.FEWEST_MOVES <= len(simulate(words)) <= cups.MOST_MOVES


@pytest.mark.parametrize("world", [cups, notes])
@pytest.mark.parametrize("split", SPLITS)
def test_the_mark_points_at_the_answer(split, world):
    for index in range(500):
        row = world.row(split, index)
        (offset,) = row["marks"]["answer"]
        words, _, _ = split_thought(row["text"])
        assert row["text"][offset - 1] == " "
        assert row["text"][offset:].split(" ")[0] == words[-2]
        assert split_thought(row["text"][: offset - 1])[0] == words[:-2]


@pytest.mark.parametrize("world", [cups, notes])
def test_a_row_depends_on_seed_split_and_index_alone(world):
    asked = [(split, index, seed) for split in SPLITS for index in (0, 7, 10**9) for seed in (0, 1)]
    first = [world.row(*ask) for ask in asked]
    random.seed(5)
    assert [world.row(*ask) for ask in reversed(asked)] == first[::-1]
    assert len({row["text"] for row in first}) == len({row["id"] for row in first}) == len(asked)


def test_rows_are_the_same_in_every_process_and_release():
    answer = PINNED.rindex(" ", 0, -2) + 1
    assert cups.row("train", 0) == {"id": "cups/train/0/0", "text": PINNED, "marks": {"answer": [answer]}}
    assert cups.row("pretrain", 3)["text"] == PINNED_THOUGHTFUL


def test_held_out_puzzles_occur_nowhere_else():
    asked = {"pretrain": 2000, "train": 2000, "heldout": 500}
    puzzles: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, count in asked.items():
        for index in range(count):
            words, _, _ = split_thought(cups.row(split, index, seed=index % 2)["text"])
            puzzles[split].add(" ".join(words))
            assert worlds.held_out(cups._read(" ".join(words))) == (split == "heldout")
    assert all(len(found) > 0.99 * asked[split] for split, found in puzzles.items())
    assert not puzzles["heldout"] & (puzzles["train"] | puzzles["pretrain"])


def test_the_held_out_side_has_its_share_of_puzzles():
    rng = random.Random(0)
    share = sum(worlds.held_out(cups._draw(rng, "train")) for _ in range(4000)) / 4000
    assert share == pytest.approx(1 / worlds.HELD_OUT, abs=0.02)


@pytest.mark.parametrize("world", [cups, notes])
def test_worked_documents_carry_the_whole_way_right_before_the_answer(world):
    shares = {}
    for split in ("worked", "mixed"):
        thoughtful = 0
        for index in range(400):
            row = world.row(split, index)
            words, thought, place = split_thought(row["text"])
            plain = " ".join(words)
            assert row["text"][row["marks"]["answer"][0] :].split(" ")[0] == words[-2]
            if thought:
                thoughtful += 1
                assert place == len(words) - 2
                right, stated = world.truth(plain, " ".join(thought))
                assert right == stated > 0
                assert thought[-1] == words[-2]
        shares[split] = thoughtful / 400
    assert shares["worked"] == 1
    assert shares["mixed"] == pytest.approx(worlds.MIXED, abs=0.1)


def test_no_worked_document_holds_a_held_out_puzzle():
    for split in ("worked", "mixed"):
        for index in range(500):
            words = split_thought(cups.row(split, index)["text"])[0]
            assert not worlds.held_out(cups._read(" ".join(words)))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        cups.row("test", 0)


def test_vocabulary_holds_exactly_the_words_in_use():
    vocabulary = cups.vocabulary()
    used = Counter(word for i in range(1500) for word in cups.row("pretrain", i)["text"].split(" "))
    assert set(used) == set(vocabulary)
    assert len(vocabulary) == len(set(vocabulary))
    for split in ("train", "heldout"):
        assert {word for i in range(200) for word in cups.row(split, i)["text"].split(" ")} <= set(vocabulary)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_only_pretraining_documents_hold_thoughts(split):
    assert all(worlds.OPEN not in cups.row(split, i)["text"] for i in range(500))


def test_thoughts_are_right_tracks_so_far_or_musings():
    musings = {
        phrase.format(one, other)
        for phrase in worlds.MUSINGS
        for one in cups.COLORS
        for other in cups.COLORS
        if one != other
    }
    partial = 0
    for index in range(2000):
        text = cups.row("pretrain", index)["text"]
        words, thought, place = split_thought(text)
        assert text.count(worlds.OPEN) == text.count(worlds.CLOSE) == (place >= 0)
        if place >= 0 and " ".join(thought) not in musings:
            # A move is finished once the word after its two cups stands before the thought
            finished = sum(5 + 4 * number < place + 1 for number in range(1, len(simulate(words)) + 1))
            track = [w for n, cup in enumerate(simulate(words)[:finished], start=1) for w in (str(n), cup)]
            assert thought == track
            partial += finished < len(simulate(words))
    assert partial > 100


def test_mixture_shares():
    count = Counter()
    for index in range(4000):
        words, thought, place = split_thought(cups.row("pretrain", index)["text"])
        if place >= 0:
            where = "answer" if place == len(words) - 2 else "elsewhere"
            count[where] += 1
            count[where, thought[0] == "1"] += 1
    thoughts = count["answer"] + count["elsewhere"]
    assert thoughts / 4000 == pytest.approx(worlds.THOUGHTFUL, abs=0.02)
    assert count["answer"] / thoughts == pytest.approx(worlds.AT_ANSWER + (1 - worlds.AT_ANSWER) / 40, abs=0.03)
    assert count["answer", True] / count["answer"] == pytest.approx(worlds.WORKED, abs=0.04)
    assert 0.2 < count["elsewhere", True] / count["elsewhere"] < worlds.WORKED


def test_neither_the_start_nor_the_last_cup_named_gives_the_answer_away():
    hits = Counter()
    for index in range(2000):
        words, _, _ = split_thought(cups.row("train", index)["text"])
        hits["start"] += words[2] == words[-2]
        hits["first of the last pair"] += words[-7] == words[-2]
        hits["last"] += words[-6] == words[-2]
        hits.update([f"always {words[-2]}"])
    assert max(hits.values()) / 2000 < 0.3


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        (TRACK, (3, 3)),
        (f"<think> {TRACK} </think>", (3, 3)),
        ("1 blue 2 red 3 black", (2, 3)),
        ("3 black", (1, 1)),
        ("1 blue 1 blue", (2, 2)),
        ("4 black", (0, 1)),
        ("hmm 2 blue maybe red", (1, 1)),
        ("maybe black", (0, 0)),
        ("1 1 blue blue 2", (1, 1)),
        ("1 , blue", (0, 0)),
        ("01 blue 10 red \u00b2 blue \u0663 blue", (0, 0)),
        ("", (0, 0)),
        ("</think> <pad> \n\t 1", (0, 0)),
    ],
)
def test_truth_counts_the_statements_of_a_thought(thought, expected):
    assert cups.truth(TEXT, thought) == expected


@pytest.mark.parametrize("text", ["", "ball", "ball under", "ball under 3 .", "the quick brown fox jumps"])
def test_truth_finds_nothing_checkable_where_there_is_no_puzzle(text):
    assert cups.truth(text, TRACK) == (0, 0)


def test_truth_reads_the_part_of_a_document_that_it_is_given():
    assert cups.truth("ball under red . swap 1 blue red , 2 green", TRACK) == (1, 3)


def test_truth_passes_over_thoughts_in_the_document():
    thoughtful = TEXT.replace("3 black", "3 <think> 1 red 2 white </think> black")
    assert thoughtful != TEXT
    assert cups.truth(thoughtful, TRACK) == (3, 3)


def test_every_pretraining_track_is_true():
    made = 0
    for index in range(500):
        text = cups.row("pretrain", index)["text"]
        right, checkable = cups.truth(text, " ".join(split_thought(text)[1]))
        assert right == checkable
        made += checkable
    assert made > 500


def test_the_world_is_listed():
    assert "cups" in worlds.WORLDS
    assert load_world("cups") is cups
