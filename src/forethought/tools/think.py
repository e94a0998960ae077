"""What `forethought think` does: thoughts at the tokens of a text, or a prompt that the model continues."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter
from pydantic.dataclasses import dataclass
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from forethought.config import Notice, UserError, merge
from forethought.html import limit, visible
from forethought.run.folder import decode_text, read_bytes
from forethought.tools import report
from forethought.tools.report.tables import signed
from forethought.tools.report.viewer import Documents

if TYPE_CHECKING:
    from forethought.inference import ScoredToken, ThinkingModel

HELPS, HURTS = ("#deebf7", "#9ecae1", "#6baed6"), ("#fee6ce", "#fdae6b", "#fd8d3c")
"""Backgrounds of black text, weak to strong, so that it reads the same on dark and on light terminals."""
_UNTRAINED = 64  # tokens of a thought, which such a model hardly ever closes
_SHOWN, _SMALLEST = 3, 0.005  # most likely tokens of a prediction, and the smallest probability among them


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Options:
    """The options of `forethought think`."""

    thoughts: PositiveInt = Field(default=1, description="N: thoughts before a token (1)")
    think_every: PositiveInt = Field(default=1, description="N: think before every N-th token (1)")
    seed: NonNegativeInt = Field(default=0, description="N: the same seed and text give the same thoughts (0)")
    max_tokens: PositiveInt = Field(default=64, description="N: at the prompt, longest continuation in tokens (64)")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=1.0, description="T: at the prompt, that of the continuation; 0: greedy (1)"
    )
    html: str = Field(default="", description="FILE: also write the thought viewer for the text there")
    json: bool = Field(default=False, description="print JSON: documents.json (docs/metrics.md) and `next`")


def load(name: str, overrides: dict[str, Any]) -> "ThinkingModel":
    """The trained model of a run, or a model, with a notice where it was never trained to think. Raises UserError."""
    from forethought.eval import run_at, trained
    from forethought.inference import ThinkingModel
    from forethought.models.loading import load_thinking_options

    log = run_at(name)
    source = name if log is None else trained(log.config(), log.path).model.path
    if not load_thinking_options(source):
        what = f"was never trained to think: it thinks with the default options, {_UNTRAINED} tokens at most"
        warnings.warn(f"{name} {what}", Notice, stacklevel=2)
        overrides = merge({"method": {"thought_length": _UNTRAINED}}, overrides)
    return ThinkingModel.load(source, overrides)


def read_text(words: Sequence[str]) -> tuple[str, str]:
    """A name for the text that the words are or name (a file, or - for stdin), and the text. Raises UserError."""
    word = " ".join(words)
    try:
        name, data = (
            ("stdin", sys.stdin.buffer.read()) if word == "-"
            else (word, read_bytes(word)) if os.path.isfile(word)  # noqa: PTH113 (Path's refuses a long text)
            else (shorten(word, 60), os.fsencode(word))
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{word}: cannot be read: {error.strerror}") from None
    if not (text := decode_text(data, name, 1).removesuffix("\n")).strip():
        raise UserError(f"text {name!r}: is empty, so there is nothing to think about")
    return name, text


def think(
    model: "ThinkingModel", name: str, text: tuple[str, str], options: Options, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The content of documents.json for one text (its name, then itself), and under `next` what would follow it.

    `name` is the model's, `progress` is told how many tokens are done, of how many. Raises UserError.
    """
    from forethought.data.corpus import Window
    from forethought.eval.heldout import Subject
    from forethought.eval.viewer import documents

    tokens = model.encode(text[1])
    if 2 * tokens.count(model.tokenizer.unk_token_id) > len(tokens):
        unknown = f"{name} does not know most of these words and reads {model.tokenizer.unk_token}"
        warnings.warn(unknown, Notice, stacklevel=2)
    model.check_length(len(tokens) + 1, options.thoughts)
    evaluate = replace(model.config.evaluate, view=1, view_thoughts=options.thoughts)
    config = replace(model.config, evaluate=evaluate)
    subject = Subject(model=model.model, engine=model.engine, form=model.form, tokenizer=model.tokenizer, config=config)
    window = Window(document=text[0], start=0, tokens=tokens, marks={})
    found = documents(
        subject, model.model, [window], name, lambda _, done, total: progress(done, total),
        every=options.think_every, seed=options.seed,
    )  # fmt: skip
    after = model.next_token(tokens, thoughts=options.thoughts, seed=options.seed)
    thoughts = [{"text": one.text, "length": len(one.tokens), "closed": one.closed} for one in after.thoughts]
    return {**found, "next": {"nothink_top": after.nothink_top, "top": after.top, "thoughts": thoughts}}


def write_page(found: dict[str, Any], out: str) -> Path:
    """Write the thought viewer for what `think` found, and return its path. Raises UserError."""
    return report.write_thoughts(TypeAdapter(Documents).validate_python(found), out)


def shown(found: dict[str, Any], console: Console) -> Iterator[RenderableType]:
    """What `think` found, for a terminal: the text colored by gain, then the thoughts at each token."""
    [document] = TypeAdapter(Documents).validate_python(found).documents
    places = {one.at: one for one in document.positions}
    gains = [places[at].gain if at in places else None for at in range(len(document.tokens))]
    yield colored(document.tokens, gains, console)
    yield Text()
    for one in document.positions:
        several = len(one.thoughts) > 1 and one.nothink is not None
        rows = [("without", _top(one.nothink_top))]
        for each in one.thoughts:
            gain = f"{signed((each.evidence or 0.0) - (one.nothink or 0.0))} " if several else ""
            rows += [("thought", gain + _thought(each.text, each.closed)), ("with", _top(each.top))]
        yield block(str(one.at), one.target, one.gain, rows)
    after = found["next"]
    thoughts = [("thought", _thought(one["text"], one["closed"])) for one in after["thoughts"]]
    rows = [("without", _top(after["nothink_top"])), *thoughts, ("with", _top(after["top"]))]
    yield block("next", after["top"][0][0], None, rows)


def written(tokens: Iterable["ScoredToken"], texts: list[str], gains: list[float | None]) -> Iterator[RenderableType]:
    """Each token as it is generated, with the thoughts before it; they and their gains are appended to the lists."""
    for one in tokens:
        texts.append(one.text)
        gains.append(one.gain)
        yield block(str(one.at), one.text, one.gain, [("thought", _thought(t.text, t.closed)) for t in one.thoughts])


def colored(texts: Sequence[str], gains: Sequence[float | None], console: Console) -> Text:
    """Tokens as text, blue where thoughts help and orange where they hurt; below it, what the colors mean."""
    full, text = limit(gains), Text()
    for words, gain in zip(texts, gains, strict=True):
        text.append(visible(words, kept="\n"), _style(gain, full))
    if console.color_system and not console.no_color:
        text.append("\n\n").append(f" hurts by {full:g} nats ", _style(-full, full)).append(" ")
        text.append(f" helps by {full:g} nats ", _style(full, full))
    return text


def block(position: str, token: str, gain: float | None, rows: Iterable[tuple[str, str]]) -> Table:
    """A token with its position and gain, and labeled lines below, wrapped to the width of the terminal."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, justify="right", min_width=len("without"))
    table.add_column(overflow="fold")
    title = Text(_token(token), "bold")
    table.add_row(Text(position, "bold"), title if gain is None else title.append(f" {signed(gain)} nats"))
    for label, text in rows:
        table.add_row(label, Text(text))
    return table


def _style(gain: float | None, full: float) -> str:
    """Three strengths of a color; none below an eighth of the full one."""
    share = abs(gain or 0.0) / full
    colors = HELPS if (gain or 0.0) > 0 else HURTS
    return "" if share < 1 / 8 else f"#000000 on {colors[min(2, int(3 * share))]}"


def _thought(text: str, closed: bool) -> str:
    return visible(text, kept="\n").strip() + ("" if closed else " ... (cut)")


def _top(tokens: Iterable[Sequence[Any]]) -> str:
    return ", ".join(f"{_token(text)} {100 * p:.0f}%" for text, p in list(tokens)[:_SHOWN] if p >= _SMALLEST)


def _token(text: str) -> str:
    """A token without the space before a word."""
    shown = report.token(text)
    return shown.removeprefix("␣") or shown
