"""The one place where logits become log-probabilities (eqs. 3 and 4): float32, in nats.

Three questions are answered here: how likely sampled tokens are, with or without gradients (`thought_logp`,
`forward_backward`); how likely the true tokens are without a thought (`no_think_logp`); and with one (`target_logp`,
`thought_evidence`, `suffix_logits`). Engines that see their own logits answer the last one while they sample.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.data.positions import Positions, ThoughtFormat, pad_rows
from forethought.flops import MAX_LOGITS, automatic_chunk, widest
from forethought.prefix import Prefix, SuffixCache, activation_checkpointing, backbone, decoder_of, lm_head, read

_ROWS = 4096  # rows of vocabulary size that are normalized at once
_NO_GRAD_FACTOR = 4  # on a GPU, a pass without gradients reads this many times the tokens of one with gradients
_BUCKET = 8  # thoughts whose lengths differ by less than this many tokens share a chunk


def log_probabilities(
    logits: Float[Tensor, "*rows vocab"], tokens: Int[Tensor, "*rows"], temperature: float = 1.0
) -> Float[Tensor, "*rows"]:
    """log softmax(logits / temperature)[token], in float32, a bounded number of rows at a time."""
    flat, wanted = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1, 1)
    pieces = []
    for piece, token in zip(flat.split(_ROWS), wanted.split(_ROWS), strict=True):
        scaled = piece.float() if temperature == 1 else piece.float() / temperature
        pieces.append(scaled.log_softmax(-1).gather(-1, token).squeeze(-1))
    return torch.cat(pieces).view(tokens.shape)


def mask_tokens(
    logits: Float[Tensor, "*rows vocab"], tokens: Int[Tensor, " masked"], where: Bool[Tensor, "*rows"] | None = None
) -> Float[Tensor, "*rows vocab"]:
    """Logits with tokens masked out, in all rows or those of `where`: a thought may not close too early.

    Tokens that the output head does not have are ignored.
    """
    if where is None:
        where = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    rows = where.nonzero()
    if not len(rows):
        return logits
    columns = tokens[tokens < logits.shape[-1]].to(logits.device)
    return logits.index_put((*rows.T[..., None], columns), logits.new_tensor(float("-inf")))


def position_ids(mask: Bool[Tensor, "row width"]) -> Int[Tensor, "row width"]:
    """0, 1, 2, ... from each row's first real token, so that padding does not shift positions."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions:
    """How the log-probabilities of thoughts are computed."""

    temperature: float  # of the log-probabilities
    tokens: int  # at most this many in one forward and backward pass
    shared: bool  # compute a document once for all its thoughts, or once for each
    checkpointing: bool = False  # keep only the inputs of each layer for the backward pass
    compiled: bool = False  # compile the layers that read thoughts over a shared document
    triton: bool = False  # attend to shared documents in Triton kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtBatch:
    """Documents and the thoughts that continue them, one row per thought.

    Example: one document of 5 tokens with two positions, prefix_lengths [[3, 5]], two thoughts at each:
    position_index [0, 0, 1, 1].
    """

    documents: list[list[int]]  # tokens up to the last position, template included
    prefix_lengths: list[list[int]]  # for each document, the tokens before each of its positions
    position_index: Int[Tensor, " row"]  # the row's position, counted over all documents
    tokens: Int[Tensor, "row thought"]  # padded on the right
    mask: Bool[Tensor, "row thought"]  # True at tokens that the policy sampled, at least one in each row
    read: tuple[Int[Tensor, "row read"], Bool[Tensor, "row read"]] | None = None  # what is read instead, and its mask
    horizon: int = 0  # targets at the end of what is read
    soft_targets: Float[Tensor, "position horizon vocab"] | None = None  # the probability of each token as a target

    @classmethod
    def from_positions(
        cls,
        form: ThoughtFormat,
        positions: Positions,
        tokens: Int[Tensor, "batch group thought"],
        mask: Bool[Tensor, "batch group thought"],
    ) -> "ThoughtBatch":
        """The thoughts sampled at some positions."""
        documents, prefix_lengths = form.documents_and_prefix_lengths(positions)
        return cls(
            documents=documents,
            prefix_lengths=prefix_lengths,
            position_index=torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1]),
            tokens=tokens.flatten(0, 1),
            mask=mask.flatten(0, 1),
        )

    def with_targets(
        self,
        form: ThoughtFormat,
        positions: Positions,
        contents: Sequence[Sequence[Sequence[int]]],
        soft_targets: Float[Tensor, "position horizon vocab"] | None = None,
    ) -> "ThoughtBatch":
        """The same thoughts, each read through the bridge and the targets of its position.

        `contents` are their tokens without those of a closing delimiter, by position and group member. All sampled
        tokens but the last are among what is read, so that one row scores both: sampled `so` `>\\n`, read `so` `>`
        `x_t`.
        """
        after = zip(contents, positions.contexts(), positions.targets().tolist(), strict=True)
        rows = [[*one, *form.bridge(context), *true] for group, context, true in after for one in group]
        read, real = (some.to(self.tokens.device) for some in pad_rows(rows, form.pad, left=False))
        return replace(self, read=(read, real), horizon=positions.horizon, soft_targets=soft_targets)

    @property
    def reading(self) -> tuple[Int[Tensor, "row read"], Bool[Tensor, "row read"]]:
        """What is read after the opening delimiter, padded on the right, and its mask: by default what was sampled."""
        return (self.tokens, self.mask) if self.read is None else self.read

    def chunks(self, tokens: int, ahead: int) -> Iterator[tuple[Int[Tensor, " row"], int]]:
        """Rows of similar length, at most `tokens` at once with `ahead` more per row; and the longest that is read."""
        lengths, positions = self.reading[1].sum(dim=-1).tolist(), self.position_index.tolist()
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i] // _BUCKET, positions[i]))
        start = 0
        while start < len(order):
            end, longest = start + 1, lengths[order[start]]
            while end < len(order) and (end + 1 - start) * (max(longest, lengths[order[end]]) + ahead) <= tokens:
                longest = max(longest, lengths[order[end]])
                end += 1
            rows = sorted(order[start:end], key=positions.__getitem__)
            yield torch.tensor(rows, device=self.position_index.device), longest
            start = end

    def prompts(self, form: ThoughtFormat) -> list[list[int]]:
        """The tokens before the thoughts of each position, the opening delimiter included."""
        return [
            [*document[:length], *form.after, *form.open]
            for document, lengths in zip(self.documents, self.prefix_lengths, strict=True)
            for length in lengths
        ]


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log p of sampled tokens (row, thought), of targets (row, horizon), and which rows they are of -> a scalar."""


def chunk_tokens(model: Any, asked: int) -> int:
    """Tokens in one forward and backward pass: as asked, or (0) as many as a fixed share of memory holds."""
    if asked:
        return asked
    options = model.config.get_text_config()
    on_gpu = model.device.type != "cpu"
    memory = torch.cuda.get_device_properties(model.device).total_memory if on_gpu else None
    sizes = options.num_hidden_layers, options.hidden_size, widest(options)
    return automatic_chunk(*sizes, model.dtype.itemsize, memory)


def thought_logp(
    model: Any, form: ThoughtFormat, rows: ThoughtBatch, options: ScoringOptions
) -> Float[Tensor, "row thought"]:
    """log pi(l_u | x_<t, l_<u) of each sampled token at the sampling temperature; 0 where the mask is False."""
    found = torch.zeros(rows.tokens.shape, device=rows.tokens.device)
    with torch.no_grad():
        prefix = read(model, rows.documents, rows.prefix_lengths) if options.shared else None
        for chunk, width in _chunks(rows, form, options):
            hidden = _hidden(model, form, rows, (chunk, width), prefix, options.triton)
            found[chunk, :width] = _logp(model, form, rows, (chunk, hidden), options.temperature)
    return found


def forward_backward(model: Any, form: ThoughtFormat, rows: ThoughtBatch, options: ScoringOptions, loss: Loss) -> None:
    """Score all thoughts and add the gradients of `loss` to the weights, in memory bounded by `options.tokens`.

    Exact, in phases that each end at detached leaves: documents once, rows chunk by chunk over them, and the vocabulary
    head on bounded numbers of scored tokens. `loss` sees whole thoughts, and its values must add up to the whole.
    """
    with activation_checkpointing(model, options.checkpointing):
        prefix = read(model, rows.documents, rows.prefix_lengths) if options.shared else None
    leaves = None if prefix is None else prefix.detached()
    for chunk, width in _chunks(rows, form, options):
        with activation_checkpointing(model, options.checkpointing, options.compiled and options.shared):
            hidden = _hidden(model, form, rows, (chunk, width), leaves, options.triton)
        leaf = hidden.detach().requires_grad_()
        size = max(1, MAX_LOGITS[model.device.type] // (width * model.get_output_embeddings().weight.shape[0]))
        for part, piece in zip(chunk.split(size), leaf.split(size), strict=True):
            logp = _logp(model, form, rows, (part, piece), options.temperature)
            loss(logp, _targets_logp(model, rows, (part, piece)) if rows.horizon else logp[:, :0], part).backward()
        hidden.backward(leaf.grad)
    if prefix is not None and leaves is not None:
        prefix.backward(leaves)


def _chunks(rows: ThoughtBatch, form: ThoughtFormat, options: ScoringOptions) -> Iterator[tuple[Tensor, int]]:
    longest = 0 if options.shared else max(length for lengths in rows.prefix_lengths for length in lengths)
    return rows.chunks(options.tokens, longest + len(form.after) + len(form.open))


def _hidden(
    model: Any, form: ThoughtFormat, rows: ThoughtBatch, chunk: tuple[Tensor, int], prefix: Prefix | None, triton: bool
) -> Float[Tensor, "row thought hidden"]:
    """Hidden states that predict each thought token of a chunk: over its prefix, or over copies where there is none."""
    some, width = chunk
    thought, real = (tensor[some, :width] for tensor in rows.reading)
    if prefix is None:
        prompts = rows.prompts(form)
        lead, mask = pad_rows([prompts[i] for i in rows.position_index[some].tolist()], form.pad, left=True)
        tokens = torch.cat([lead.to(thought.device), thought], dim=1)
        mask = torch.cat([mask.to(thought.device), real], dim=1)
        hidden = decoder_of(model)(
            input_ids=tokens, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
        ).last_hidden_state
    else:
        ahead = torch.tensor([*form.after, *form.open], device=thought.device).expand(len(some), -1)
        fork = SuffixCache(prefix, rows.position_index[some].tolist(), triton=triton)
        tokens = torch.cat([ahead, thought], dim=1)
        hidden = backbone(model, tokens, fork, fork.position_ids(tokens.shape[1]))
    return hidden[:, -width - 1 : -1]


def _logp(
    model: Any, form: ThoughtFormat, rows: ThoughtBatch, chunk: tuple[Tensor, Tensor], temperature: float
) -> Float[Tensor, "row thought"]:
    """Log-probabilities of sampled tokens from the hidden states that predict them; 0 elsewhere."""
    some, hidden = chunk
    width = hidden.shape[1]
    mask, tokens = rows.mask[some, :width], rows.tokens[some, :width]
    logits = form.decodable(lm_head(model, hidden[:, : mask.shape[1]][mask]))
    early = torch.zeros_like(mask)
    early[:, : form.closing.shortest] = True
    found = log_probabilities(mask_tokens(logits, form.closing.early, early[mask]), tokens[mask], temperature)
    return torch.zeros(mask.shape, device=found.device).masked_scatter(mask, found)


def _target_logits(
    model: Any, rows: ThoughtBatch, chunk: tuple[Tensor, Tensor], horizon: int
) -> tuple[Float[Tensor, "row horizon vocab"], Int[Tensor, "row horizon"]]:
    """Logits that predict the last `horizon` tokens that each row reads, and these tokens."""
    some, hidden = chunk
    tokens, mask = rows.reading
    columns = mask[some].sum(dim=-1)[:, None] + torch.arange(-horizon, 0, device=some.device)
    logits = lm_head(model, hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1])))
    return logits, tokens[some].gather(1, columns)


def _targets_logp(model: Any, rows: ThoughtBatch, chunk: tuple[Tensor, Tensor]) -> Float[Tensor, "row horizon"]:
    """log p of each target, nats; its mean where targets are soft."""
    logits, tokens = _target_logits(model, rows, chunk, rows.horizon)
    if rows.soft_targets is None:
        return log_probabilities(logits, tokens)
    return (rows.soft_targets[rows.position_index[chunk[0]]] * logits.float().log_softmax(-1)).sum(-1)


def no_think_logp(
    model: Any, positions: Positions, tokens: int
) -> tuple[Float[Tensor, "batch horizon"], Bool[Tensor, "batch horizon"]]:
    """No-think log-evidence (eq. 4): log p(x_t+k | x_<t+k) of each target, and whether it was the likeliest token.

    One pass over each window, up to its last target, serves all its positions. No delimiters, no template. At most
    about `tokens` tokens are read at once.
    """
    found = [_evidence(*part) for part in _plain_logits(model, positions, tokens)]
    evidence, hits = map(torch.cat, zip(*found, strict=True))
    return evidence, hits


@torch.no_grad()
def no_think_scores(
    model: Any, positions: Positions, tokens: int
) -> tuple[Float[Tensor, "batch horizon"], Bool[Tensor, "batch horizon"], Float[Tensor, " batch"]]:
    """What `no_think_logp` returns, and the entropy of p(. | x_<t) in nats, on the CPU; from the same pass."""
    found = [
        (*_evidence(logits, targets), entropy(logits[:, 0]).cpu())
        for logits, targets in _plain_logits(model, positions, tokens)
    ]
    evidence, hits, entropies = map(torch.cat, zip(*found, strict=True))
    return evidence, hits, entropies


@torch.no_grad()
def no_think_entropy(model: Any, positions: Positions, tokens: int) -> Float[Tensor, " batch"]:
    """Entropy of p(. | x_<t) over the whole vocabulary, without a thought, in nats, on the CPU; one pass a window."""
    return torch.cat([entropy(logits[:, 0]).cpu() for logits, _ in _plain_logits(model, positions, tokens)])


def entropy(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """Entropy of softmax(logits) in float32, in nats, a bounded number of rows at a time."""
    pieces = logits.split(_ROWS // 8)  # a copy of what is already the largest tensor here
    return torch.cat([torch.special.entr(piece.float().softmax(dim=-1)).sum(dim=-1) for piece in pieces])


def _evidence(
    logits: Float[Tensor, "part horizon vocab"], targets: Int[Tensor, "part horizon"]
) -> tuple[Float[Tensor, "part horizon"], Bool[Tensor, "part horizon"]]:
    """log p of the targets, and whether each was the likeliest token."""
    return log_probabilities(logits, targets), logits.argmax(dim=-1) == targets


def no_think_distribution(
    model: Any, positions: Positions, tokens: int, targets: int = 1
) -> Float[Tensor, "batch target vocab"]:
    """log p(. | x_<t+k) of every token at the first targets, without a thought (eq. 4), nats; one pass a window."""
    pieces = [logits[:, :targets].float() for logits, _ in _plain_logits(model, positions, tokens)]
    return torch.cat([piece.log_softmax(-1) for piece in pieces])


def _plain_logits(
    model: Any, positions: Positions, tokens: int
) -> Iterator[tuple[Float[Tensor, "part horizon vocab"], Int[Tensor, "part horizon"]]]:
    """The logits that predict the targets of each position, a bounded number of positions at a time; the targets."""
    tokens *= _NO_GRAD_FACTOR if model.device.type == "cuda" else 1
    for chunk in positions.chunks_of_tokens(tokens):
        targets = chunk.targets().to(model.device)
        used, owner = chunk.window.unique(return_inverse=True)
        ends = torch.zeros(len(used), dtype=torch.long).scatter_reduce(0, owner, chunk.at, "amax") + chunk.horizon - 1
        rows = [chunk.windows[w].tokens[:end] for w, end in zip(used.tolist(), ends.tolist(), strict=True)]
        padded, _ = pad_rows(rows, 0, left=False)
        hidden = decoder_of(model)(input_ids=padded.to(model.device), use_cache=False).last_hidden_state
        places = chunk.at[:, None] - 1 + torch.arange(chunk.horizon)
        picked = hidden[owner[:, None].to(model.device), places.to(model.device)]
        for part, target in zip(picked.split(_ROWS), targets.split(_ROWS), strict=True):
            yield lm_head(model, part), target


def thought_evidence(
    model: Any,
    positions: Positions,
    form: ThoughtFormat,
    thoughts: Sequence[Sequence[Sequence[int]]],
    shared: bool = False,
) -> Float[Tensor, "batch group vocab"]:
    """log p(. | x_<t, c) of every token that could follow given thoughts (eq. 3), at temperature 1, in nats.

    `thoughts` holds the same number of thoughts for each position, as tokens without the closing delimiter; one without
    tokens is the empty thought. At x_t this is the evidence that an engine reports for a thought that it sampled. With
    `shared` (a model that `prefix.enable` prepared) each window is read once for all of them.
    """
    rows = [
        [[*form.after, *form.open, *thought, *form.bridge(context)] for thought in group]
        for context, group in zip(positions.contexts(), thoughts, strict=True)
    ]
    logits = suffix_logits(model, positions, form, rows, 1, shared)
    return logits.float().log_softmax(dim=-1).view(len(positions), -1, logits.shape[-1])


def suffix_logits(
    model: Any,
    positions: Positions,
    form: ThoughtFormat,
    suffixes: Sequence[Sequence[Sequence[int]]],
    keep: int,
    shared: bool = False,
) -> Float[Tensor, "row kept vocab"]:
    """Logits that follow the last `keep` tokens of suffixes, a row each, position by position.

    Suffixes continue what the thinking model reads up to x_<t; a position may have any number of them.
    Columns ahead of a suffix shorter than `keep` mean nothing. `shared` as in `thought_evidence`, where no suffix may
    be empty.
    """
    rows = [suffix for group in suffixes for suffix in group]
    places = [place for place, group in enumerate(suffixes) for _ in group]
    if shared:
        tokens, mask = pad_rows(rows, form.pad, left=False)
        fork = SuffixCache(read(model, *form.documents_and_prefix_lengths(positions)), places)
        hidden = backbone(model, tokens.to(model.device), fork, fork.position_ids(tokens.shape[1]))
        columns = (mask.sum(dim=1, keepdim=True) + torch.arange(-keep, 0)).clamp(min=0).to(model.device)
        return lm_head(model, hidden[torch.arange(len(rows), device=model.device)[:, None], columns])
    ahead = [form.prefix_tokens(context) for context in positions.contexts()]
    copies = [[*ahead[place], *row] for place, row in zip(places, rows, strict=True)]
    tokens, mask = pad_rows(copies, form.pad, left=True)
    return forward(model, tokens.to(model.device), mask.to(model.device), keep)


@torch.no_grad()
def target_logp(
    model: Any, form: ThoughtFormat, rows: ThoughtBatch, horizon: int, options: ScoringOptions
) -> tuple[Float[Tensor, "row horizon"], Bool[Tensor, "row horizon"]]:
    """log p of each row's last `horizon` tokens at temperature 1 (eq. 3), nats, and whether each was the likeliest.

    `rows` hold thoughts, bridges and targets. What an engine needs that does not see the policy's logits.
    """
    evidence = torch.zeros(len(rows.position_index), horizon, device=rows.tokens.device)
    hit = torch.zeros_like(evidence, dtype=torch.bool)
    prefix = read(model, rows.documents, rows.prefix_lengths) if options.shared else None
    for chunk, width in _chunks(rows, form, options):
        hidden = _hidden(model, form, rows, (chunk, width), prefix, options.triton)
        logits, targets = _target_logits(model, rows, (chunk, hidden), horizon)
        evidence[chunk] = log_probabilities(logits, targets)
        hit[chunk] = logits.argmax(dim=-1) == targets
    return evidence, hit


def forward(
    model: Any, tokens: Int[Tensor, "row width"], mask: Bool[Tensor, "row width"], keep: int | Tensor
) -> Float[Tensor, "row kept vocab"]:
    """Logits of a causal LM at the last `keep` columns (or at the columns that a tensor names), without a cache."""
    return model(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        logits_to_keep=keep,
        use_cache=False,
    ).logits
