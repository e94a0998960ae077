"""The decoding state of thoughts: sample, close by force where needed, read the evidence off the logits."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forethought.config import Method
from forethought.data.positions import ThoughtFormat
from forethought.models.logprobs import log_probabilities, mask_token
from forethought.rollout import Responses, Thoughts


class Rows:
    """All rows, position by position: each thinks, then is fed `close` (if it must be) and its targets.

    `tail` is -1 while a row thinks; afterwards it is the index, in close + targets, of the token it is fed next. Rows
    need not be at the same token of their thoughts. With `writing` (a uniform number for each token) a row goes on to
    sample: what it writes takes the place of the target that was scored there. `drawing` stands for `draw`.
    """

    def __init__(
        self,
        targets: Int[Tensor, "batch horizon"],
        form: ThoughtFormat,
        noise: Float[Tensor, "batch group thought"],
        device: torch.device,
        writing: Float[Tensor, "batch group horizon"] | None = None,
        drawing: Callable[[Tensor, Tensor, Method], tuple[Tensor, Tensor]] | None = None,
    ):
        group, limit = noise.shape[1:]
        rows = noise.shape[0] * group
        self.drawing = drawing or draw
        self.noise = noise.reshape(rows, limit).to(device)
        self.writing = None if writing is None else writing.flatten(0, 1).to(device)
        self.close = torch.tensor(form.close, device=device)
        forced = self.close.expand(rows, -1)
        self.feed = torch.cat([forced, targets.to(device).repeat_interleave(group, 0)], dim=1)
        self.tail = torch.full((rows,), -1, device=device)
        self.tokens = torch.full((rows, limit), form.pad, device=device)
        self.logp = torch.zeros(rows, limit, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.closed = torch.zeros(rows, dtype=torch.bool, device=device)
        self.evidence = torch.zeros(rows, targets.shape[1], device=device)
        self.hit = torch.zeros(rows, targets.shape[1], dtype=torch.bool, device=device)
        self.written_logp = torch.zeros(rows, targets.shape[1], device=device)
        self.alive = torch.zeros(0, dtype=torch.long, device=device)  # rows that are in the cache, in its order
        self.fresh = False  # whether some of them have not thought a token yet
        self.behind = torch.arange(1 - len(form.close), 1, device=device)  # tokens of a delimiter, from its last

    def begin(self, start: int, end: int) -> None:
        """Rows start .. end-1 stand in the cache now, behind those that already do."""
        self.alive = torch.cat([self.alive, torch.arange(start, end, device=self.alive.device)])
        self.fresh = True

    def advance(self, logits: Float[Tensor, "row vocab"], options: Method) -> Int[Tensor, " row"]:
        """Use the logits of the rows in the cache: sample or score; return the token that each row reads next."""
        tail = self.tail[self.alive]
        thinking = tail < 0
        count = int(thinking.sum())
        if count == len(tail):
            return self._think(logits, self.alive, options)
        place = tail.clamp(min=0, max=self.feed.shape[1] - 1)
        self._score(logits, tail, self.feed[self.alive, place], options)
        fed = self.feed[self.alive, place]  # read again: rows that write have changed it
        if count:
            fed[thinking] = self._think(logits[thinking], self.alive[thinking], options)
        return fed

    def _score(
        self, logits: Float[Tensor, "row vocab"], tail: Int[Tensor, " row"], fed: Int[Tensor, " row"], options: Method
    ) -> None:
        """Record the evidence of rows at a target, write there, and move every row that does not think one token on."""
        scored = ((tail >= len(self.close)) & (tail < self.feed.shape[1])).nonzero().squeeze(-1)
        rows, column = self.alive[scored], tail[scored] - len(self.close)
        if scored.numel():
            here = logits[scored]
            self.evidence[rows, column] = log_probabilities(here, fed[scored])
            self.hit[rows, column] = here.argmax(dim=-1) == fed[scored]
            if self.writing is not None:
                token = sample(here, self.writing[rows, column], options.temperature, options.top_p)
                self.feed[rows, tail[scored]] = token
                self.written_logp[rows, column] = log_probabilities(here, token, options.temperature)
        self.tail[self.alive] = torch.where(tail >= 0, tail + 1, tail)

    def _think(
        self, logits: Float[Tensor, "thinker vocab"], rows: Int[Tensor, " thinker"], options: Method
    ) -> Int[Tensor, " thinker"]:
        """Sample the next thought token of rows that think; note which of them are done thinking."""
        at = self.length[rows]
        if self.fresh:
            logits, self.fresh = mask_token(logits, int(self.close[0]), at == 0), False
        token, logp = self.drawing(logits, self.noise[rows, at], options)
        self.tokens[rows, at] = token
        self.logp[rows, at] = logp
        size, limit, length = len(self.close), self.tokens.shape[1], at + 1
        self.length[rows] = length
        ending = self.tokens[rows[:, None], (at[:, None] + self.behind).clamp(min=0)]
        closed = (ending == self.close).all(dim=-1) & (length > size)
        self.closed[rows] = closed
        self.tail[rows] = torch.where(closed, size, torch.where(length == limit, 0, -1))
        return token

    def alive_rows(self) -> Int[Tensor, " row"]:
        """Indices, among the rows in the cache, of those that still have a token to think or to score."""
        return (self.tail[self.alive] < self.feed.shape[1]).nonzero().squeeze(-1)

    def drop(self, keep: Int[Tensor, " row"]) -> None:
        """Forget finished rows."""
        self.alive = self.alive[keep]

    def thoughts(self, batch: int, group: int) -> Thoughts:
        """The result, cut to the longest thought."""
        width = int(self.length.max())
        mask = torch.arange(width, device=self.length.device) < self.length[:, None]
        return Thoughts(
            tokens=self.tokens[:, :width].view(batch, group, width).clone(),
            mask=mask.view(batch, group, width),
            closed=self.closed.view(batch, group),
            logp=self.logp[:, :width].view(batch, group, width).clone(),
            evidence=self.evidence.view(batch, group, -1),
            hit=self.hit.view(batch, group, -1),
        )

    def responses(self, batch: int, group: int) -> Responses:
        """The result of rows that wrote: only their first target was one."""
        thoughts = self.thoughts(batch, group)
        return Responses(
            thoughts=replace(thoughts, evidence=thoughts.evidence[..., :1], hit=thoughts.hit[..., :1]),
            written=self.feed[:, len(self.close) :].view(batch, group, -1),
            logp=self.written_logp.view(batch, group, -1),
        )


def draw(
    logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], options: Method
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """A token per row at a uniform number, by `sample`, and its log-probability at the temperature."""
    token = sample(logits, noise, options.temperature, options.top_p)
    return token, log_probabilities(logits, token, options.temperature)


def sample(
    logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], temperature: float, top_p: float
) -> Int[Tensor, " row"]:
    """Draw a token per row by inverting the cumulative distribution at a uniform number; float64 sums.

    With top_p < 1 the draw is from the smallest set of likeliest tokens whose probability reaches top_p.
    """
    probability = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        probability = probability.scatter(-1, order, ordered.masked_fill(outside, 0))
    cumulative = probability.double().cumsum(dim=-1)
    point = noise.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
