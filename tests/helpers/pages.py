"""Run folders with made-up contents, and a browser that reads the pages made of them."""

import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

from forethought.config import Config, from_dict, to_dict

HOSTILE = '<script>alert("x")</script> <b>bold</b> & "quoted" <img src=http://evil.example/x.png> \x00\x1b[31m \u202e'


def config(method: str = "rlp", seed: int = 0) -> Config:
    options = {"name": method, "group": 8, "thought_length": 24}
    return from_dict({"seed": seed, "method": options, "train": {"steps": 80, "batch": 32}})


def metrics(method: str, steps: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        done = step / 80
        row = {"step": step, "optim/gradient_norm": 1.2 + draw.gauss(0, 0.2), "optim/learning_rate": 1e-4}
        row |= {"time/step_s": 1.5 + 0.1 * draw.random(), "corpus/documents": 32 * step, "corpus/skipped": 0}
        if method == "cpt":
            loss = 2.2 - 0.6 * done + draw.gauss(0, 0.05)
            rows.append(row | {"objective/loss": loss, "objective/accuracy": 0.4 + 0.2 * done + draw.gauss(0, 0.01)})
            continue
        evidence, nothink = -1.6 + 0.9 * done + draw.gauss(0, 0.08), -1.5 + 0.2 * done + draw.gauss(0, 0.03)
        row |= {"reward/evidence": evidence, "reward/std": 0.4 + 0.2 * done + draw.gauss(0, 0.04)}
        if step % 2:
            row |= {"reward/gain": evidence - nothink, "reward/nothink": nothink}
        row |= {"rollout/length": 18 - 6 * done + draw.gauss(0, 0.5), "rollout/closed": min(1, 0.4 + 0.6 * done)}
        row |= {"objective/loss": draw.gauss(0, 0.01), "objective/ratio": 1 + draw.gauss(0, 1e-6)}
        row |= {"objective/clip_fraction": 0.0, "objective/mismatch": 1e-6 * draw.random()}
        row |= {"reward/zero_std_fraction": 0.3 - 0.2 * done, "time/thought_tokens_per_s": 170 + draw.gauss(0, 8)}
        rows.append(row)
    return rows


def position(step: int, place: int, draw: random.Random) -> dict:
    rewards = [draw.gauss(step / 80, 0.5) for _ in range(8)]
    texts = [f"{index} blue {index} red hmm let me see" for index in range(8)]
    texts[0] = texts[3] = f"1 blue\n2 blue\t3 black {HOSTILE}"
    texts[5] = "a thought that goes on " * 60
    samples = [
        {"text": text, "length": 7 + index, "closed": index % 4 != 0, "evidence": reward - 1.609, "reward": reward,
         "advantage": 8 / 7 * (reward - sum(rewards) / 8)}
        for index, (text, reward) in enumerate(zip(texts, rewards, strict=True))
    ]  # fmt: skip
    context = f"ball under red . swap 1 blue red .\n{HOSTILE}\nnow under" if place else "a long story " * 60
    nothink = None if step % 2 == 0 else -1.609
    return {"step": step, "document": 32 * step + place, "position": 17, "context": context, "target": " black",
            "nothink": nothink, "thoughts": samples}  # fmt: skip


def thoughts(steps: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    return [position(step, place, draw) for step in range(1, steps + 1) for place in range(2)]


def summary(seed: int) -> dict:
    values: dict = {"method": "rlp", "seed": seed, "seconds": 725.4, "steps": 80}
    for phase, shift in (("before", 0.0), ("after", 0.3)):
        for group in ("all", "answer"):
            for name, value in {"ce_think": 1.7 - shift, "ce_nothink": 1.6 - shift / 3, "gain_self": shift - 0.1,
                                "gain_over_base": shift - 0.1, "accuracy_think": 0.3 + shift,
                                "accuracy_nothink": 0.35, "thought_length": 18 - 10 * shift,
                                "closed": 0.5 + shift}.items():  # fmt: skip
                key = f"{phase}/{group}/{name}"
                values |= {key: value, f"{key}/low": value - 0.06, f"{key}/high": value + 0.06}
    return values


def make_run(path: Path, method: str = "rlp", steps: int = 80, seed: int = 0, evaluated: bool = True) -> Path:
    """A run folder such as training leaves."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"version": "0.2.0", **to_dict(config(method, seed))}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(method, steps, seed)))
    if method != "cpt":
        (path / "thoughts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thoughts(steps, seed)))
    if evaluated:
        (path / "summary.json").write_text(json.dumps(summary(seed) | {"method": method}))
    return path


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and whether every element is closed in its turn."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
