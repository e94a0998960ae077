"""The size of a transformers config (parameters, layers, memory) and the FLOPs of a training step.

Arithmetic on a config: no weights, no torch. A multiply-add is 2 FLOPs, and counts are exact. Counted are matrix
products (projections, MLPs, experts, the vocabulary head at the tokens that need logits), attention scores and values,
and Mamba-2's convolution and scan. A backward pass costs twice its forward pass. Not counted: elementwise operations,
norms, softmax, the optimizer, the teacher's EMA, padding, recomputation that saves memory, and evaluation. A frozen
weight (`Shape.adapter`) has no gradient: its backward pass counts once. docs/flops.md has the formulas.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

from forethought.config import Lora, UserError

MAX_LOGITS = {"cpu": 2**26, "cuda": 2**28}
"""Logits that the update holds in memory at once, with their gradients."""
PREPACK_MIN_WEIGHTS = 1_000_000
"""Weights of linear layers from which a CPU decodes with prepacked ones; fewer fit a core's cache (4 MB)."""


def _add(one: Any, more: Any) -> Any:
    """The sum of two dataclasses of one kind, field by field."""
    return type(one)(**{each.name: getattr(one, each.name) + getattr(more, each.name) for each in fields(one)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # most keys that a token attends to, its own included; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba:
    """One Mamba-2 layer (arXiv:2405.21060). Its state has heads x head_dim x state numbers."""

    heads: int
    head_dim: int
    state: int
    groups: int  # heads of a group share B and C
    kernel: int  # width of the causal convolution before the scan
    chunk: int  # tokens per chunk of the scan

    @property
    def inner(self) -> int:
        """Width of the values."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: values, B and C."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBytes:
    """Bytes that autograd saves of one token for the backward pass, with fused attention and without weights.

    Counted from transformers' layers: tests/tools/plan/test_plan_memory.py measures it.
    """

    fp32: int = 0
    bf16: int = 0  # bf16 weights; norms compute in fp32
    fused: int = 0  # the same with fused norms and gated MLPs, as on a GPU (forethought.models.fused)

    __add__ = _add

    def __mul__(self, count: int) -> "SavedBytes":
        return SavedBytes(fp32=count * self.fp32, bf16=count * self.bf16, fused=count * self.fused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What determines the cost of a causal language model."""

    model_type: str
    hidden: int
    vocab: int
    parameters: int  # all of them, tied ones once
    matmul_weights: int  # weights below the head that multiply each token; of experts the active ones
    attention: tuple[Attention, ...]  # of every layer that has one
    mamba: tuple[Mamba, ...]  # of every layer that has one
    layers: int = 0
    intermediate: int = 0  # width of the widest MLP
    experts: int = 0  # routed experts, over all layers
    saved: SavedBytes = field(default_factory=SavedBytes)  # of a token, without Mamba layers: see `mamba_saved`
    linears: tuple[tuple[str, int, int], ...] = ()  # what LoRA can adapt: name, layer, inputs plus outputs
    adapter: int = 0  # weights of adapters, included in `matmul_weights`; above 0 all other weights are frozen

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a transformers config. Raises UserError for an architecture that is not in FAMILIES."""
        kind = config.model_type
        if kind not in FAMILIES:
            raise UserError(f"model_type = {kind!r}: its FLOPs are not known; known are {', '.join(sorted(FAMILIES))}")
        layers = FAMILIES[kind](config)
        whole = sum(layers, _norms(config, 1))  # with the norm after the last layer
        embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        return cls(
            model_type=kind,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            parameters=whole.matmul_weights + whole.other + embeddings,
            matmul_weights=whole.matmul_weights,
            attention=whole.attention,
            mamba=whole.mamba,
            layers=config.num_hidden_layers,
            intermediate=widest(config),
            experts=whole.experts,
            saved=whole.saved,
            linears=tuple((name, i, width) for i, layer in enumerate(layers) for name, width in layer.linears.items()),
        )

    @classmethod
    def known(cls, config: Any) -> "Shape | None":
        """The same of the text model, or None for an architecture that is not in FAMILIES: it reports no FLOPs."""
        config = config.get_text_config()
        return cls.of(config) if config.model_type in FAMILIES else None

    def adapted(self, options: Lora) -> "Shape":
        """The shape, frozen and with LoRA adapters (unchanged where r is 0). Raises UserError for an unknown layer."""
        if not options.r:
            return self
        if options.target_modules == ("all-linear",):
            return self.with_adapter(options.r * sum(width for *_, width in self.linears))
        adapted: set[tuple[str, int, int]] = set()
        for wanted in options.target_modules:  # such as q_proj or layers.2.mlp.up_proj
            *path, name = wanted.split(".")
            layers = [int(part) for part in path if part.isdigit()] or range(self.layers)
            found = {one for one in self.linears if one[0] == name and one[1] in layers}
            if not found:
                known = ", ".join(sorted({one for one, *_ in self.linears}))
                what = f"lora.target_modules = {wanted!r}"
                raise UserError(f"{what}: the model's linear layers are {known}, or all-linear")
            adapted |= found
        return self.with_adapter(options.r * sum(width for *_, width in adapted))

    def with_adapter(self, weights: int) -> "Shape":
        """The shape, frozen, with adapters of so many weights."""
        return replace(self, matmul_weights=self.matmul_weights + weights, adapter=weights)


def automatic_chunk(layers: int, hidden: int, intermediate: int, element: int, gpu_memory: float | None) -> int:
    """Tokens of one forward and backward pass where update.tokens_per_chunk is 0, `element` bytes per number.

    A pass saves about 14 hidden and 5 intermediate vectors per token and layer. They may take an eighth of a GPU's
    memory, or 1 GiB on a CPU (`gpu_memory` None).
    """
    budget = 2**30 if gpu_memory is None else gpu_memory // 8
    vectors = layers * (14 * hidden + 5 * intermediate)
    return int(min(max(budget // (vectors * element), 256), 2**16))


def widest(config: Any) -> int:
    """The config's intermediate_size, the largest of several; four times the hidden size where there is none."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(width) if isinstance(width, (list, tuple)) else width


def mamba_saved(one: Mamba) -> tuple[SavedBytes, SavedBytes]:
    """Bytes that a Mamba-2 layer without mamba_ssm saves of a token, and of a token of the scan's whole chunks.

    The coefficients are fitted to what autograd saves of transformers' scan over ten sizes.
    """
    pairs, states = one.chunk * one.heads, one.heads * one.state
    carried = one.inner * one.state // one.chunk
    half = 4 * (7 * one.inner + one.channels + 3 * one.heads)
    token = SavedBytes(fp32=4 * (6 * one.inner + 3 * one.channels + 4 * one.heads), bf16=half, fused=half)
    scan = 4 * (3 * pairs + 5 * states + 4 * one.inner + 4 * one.heads + 2 * carried)  # fp32 in any precision
    return token, SavedBytes(fp32=scan, bf16=scan, fused=scan)


_GATED = ("gate_proj", "up_proj", "down_proj")
_JOINED = ("input_linear", "output_linear")
_PLAIN = ("up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A layer, a part of one, or several: parts are added up."""

    matmul_weights: int = 0
    other: int = 0  # other parameters: biases, norms, convolutions, inactive experts
    attention: tuple[Attention, ...] = ()
    mamba: tuple[Mamba, ...] = ()
    experts: int = 0
    saved: SavedBytes = field(default_factory=SavedBytes)
    linears: Counter[str] = field(default_factory=Counter)  # inputs plus outputs, by name

    __add__ = _add


Layers = list[_Part]


def _norms(config: Any, count: int) -> _Part:
    """A norm saves its input, the normalized input, its output and a factor; as a fused kernel less."""
    hidden = config.hidden_size
    saved = SavedBytes(fp32=12 * hidden + 4, bf16=8 * hidden + 4, fused=4 * hidden + 4)
    return _Part(other=count * hidden, saved=saved * count)


def _linear(inputs: int, outputs: int, bias: bool = False, name: str = "") -> _Part:
    """`name`: of a layer that LoRA can adapt."""
    named = Counter({name: inputs + outputs} if name else {})
    return _Part(matmul_weights=inputs * outputs, other=outputs * bias, linears=named)


def _attention(config: Any, window: int | None, biases: tuple[bool, bool], query_norm: bool = False) -> _Part:
    """Projections and head norms. `biases`: of the query, key and value projections; of the output projection."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    numbers = size * (3 * heads + 2 * kv_heads)  # query, output twice; keys, values
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=size, window=window)
    normed, factors = size * (heads + kv_heads) * query_norm, 4 * (heads + (heads + kv_heads) * query_norm)
    saved = SavedBytes(
        fp32=4 * (numbers + 2 * normed) + factors,
        bf16=2 * (numbers + 3 * normed) + factors,
        fused=2 * (numbers + size * (heads + kv_heads)) + factors,  # values keep the joint product, too
    )
    return (
        _Part(attention=(attention,), other=2 * size * query_norm, saved=saved)
        + _linear(hidden, heads * size, biases[0], "q_proj")
        + _linear(hidden, kv_heads * size, biases[0], "k_proj")
        + _linear(hidden, kv_heads * size, biases[0], "v_proj")
        + _linear(heads * size, hidden, biases[1], "o_proj")
    )


def _mlp(inputs: int, inner: int, bias: bool = False, names: tuple[str, ...] = _GATED) -> _Part:
    gated = names != _PLAIN
    numbers = (4 if gated else 2) * inner
    saved = SavedBytes(fp32=4 * numbers, bf16=2 * numbers, fused=2 * (numbers - inner * gated))  # silu is recomputed
    *first, last = names
    width = (2 if gated else 1) * inner // len(first)
    return sum(
        (_linear(inputs, width, bias, name) for name in first),
        _linear(inner, inputs, bias, last) + _Part(saved=saved),
    )


def _experts(expert: _Part, config: Any) -> _Part:
    """A router and num_local_experts experts, of which num_experts_per_tok are active for each token."""
    active, count, expert = config.num_experts_per_tok, config.num_local_experts, replace(expert, linears=Counter())
    inactive = _Part(other=(count - active) * expert.matmul_weights, experts=count)
    numbers = 3 * config.hidden_size  # inputs and outputs of an expert
    gathered = SavedBytes(fp32=4 * numbers, bf16=2 * numbers, fused=2 * numbers)
    used = _Part(matmul_weights=active * expert.matmul_weights, saved=(expert.saved + gathered) * active)
    return _linear(config.hidden_size, count) + used + inactive


_MAMBA = "mamba_n_heads mamba_d_head mamba_d_state mamba_n_groups mamba_d_conv mamba_chunk_size"


def _mamba_sizes(config: Any, names: str = _MAMBA) -> Mamba:
    """`names`: the config's options for the fields of `Mamba`, in their order."""
    sizes = [getattr(config, name) for name in names.split()]
    return Mamba(**{one.name: size for one, size in zip(fields(Mamba), sizes, strict=True)})


def _mamba(config: Any, sizes: Mamba, biases: tuple[bool, bool, bool], norm: bool = True) -> _Part:
    """A Mamba-2 mixer. `biases`: of the input projection, the convolution, the output projection."""
    return (
        _Part(mamba=(sizes,), other=sizes.channels * (sizes.kernel + biases[1]) + 3 * sizes.heads + sizes.inner * norm)
        + _linear(config.hidden_size, sizes.inner + sizes.channels + sizes.heads, biases[0], "in_proj")
        + _linear(sizes.inner, config.hidden_size, biases[2])
    )


def _windows(config: Any) -> list[int | None]:
    """The sliding window of each layer, from layer_types; without these, of every layer or of none."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [getattr(config, "sliding_window", None)] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def _decoder(config: Any, biases: tuple[bool, bool] | None = None, norms: int = 2, query_norm: bool = False) -> Layers:
    """Attention and a gated MLP, or experts, in each layer. Biases are the config's, unless the family fixes them."""
    if biases is None:
        biases = (config.attention_bias, config.attention_bias)
    mlp = _mlp(config.hidden_size, config.intermediate_size, getattr(config, "mlp_bias", False))
    rest = (_experts(mlp, config) if config.model_type == "mixtral" else mlp) + _norms(config, norms)
    return [_attention(config, window, biases, query_norm) + rest for window in _windows(config)]


def _nemotron_h(config: Any) -> Layers:
    """Layers of one mixer each: Mamba-2, attention without biases, an MLP without gate, or experts of that kind."""
    hidden, bias, latent = config.hidden_size, config.mlp_bias, config.moe_latent_size
    sizes = _mamba_sizes(config, "mamba_num_heads mamba_head_dim ssm_state_size n_groups conv_kernel chunk_size")
    expert = _mlp(latent or hidden, config.moe_intermediate_size, names=_PLAIN)
    shared = _mlp(hidden, config.moe_shared_expert_intermediate_size, bias, names=_PLAIN)
    to_latent = _Part()
    if latent:
        to_latent = _linear(hidden, latent, bias, "fc1_latent_proj") + _linear(latent, hidden, bias, "fc2_latent_proj")
    mixers = {
        "linear_attention": _mamba(config, sizes, (config.use_bias, config.use_conv_bias, config.use_bias)),
        "full_attention": _attention(config, None, (False, False)),
        "mlp": _mlp(hidden, config.intermediate_size, bias, names=_PLAIN),
        "moe": _experts(expert, config) + shared + to_latent,
    }
    return [mixers[kind] + _norms(config, 1) for kind in config.layers_block_type]


def _hybrid(config: Any, kinds: list[str], rest: _Part) -> Layers:
    """Mamba-2 or attention, then the rest of a layer."""
    bias, proj = config.attention_bias, config.mamba_proj_bias
    mixers = {
        "linear_attention": _mamba(config, _mamba_sizes(config), (proj, config.mamba_conv_bias, proj)),
        "full_attention": _attention(config, None, (bias, bias)),
    }
    return [mixers[kind] + rest for kind in kinds]


def _granite_hybrid(config: Any) -> Layers:
    """With an MLP that all tokens share, beside experts where there are any."""
    rest = _mlp(config.hidden_size, config.shared_intermediate_size, names=_JOINED) + _norms(config, 2)
    if config.num_local_experts:
        rest += _experts(_mlp(config.hidden_size, config.intermediate_size), config)
    return _hybrid(config, config.layer_types, rest)


def _bamba(config: Any) -> Layers:
    rest = _mlp(config.hidden_size, config.intermediate_size, config.mlp_bias) + _norms(config, 2)
    return _hybrid(config, config.layers_block_type, rest)


def _falcon_h1(config: Any) -> Layers:
    """Mamba-2 and attention side by side in every layer, then a gated MLP."""
    bias = config.attention_bias
    biases = (config.mamba_proj_bias, config.mamba_conv_bias, config.projectors_bias)
    layer = (
        _mamba(config, _mamba_sizes(config), biases, config.mamba_rms_norm)
        + _attention(config, None, (bias, bias))
        + _mlp(config.hidden_size, config.intermediate_size, config.mlp_bias)
        + _norms(config, 2)
    )
    return [layer] * config.num_hidden_layers


FAMILIES: dict[str, Callable[[Any], Layers]] = {
    "llama": _decoder,
    "smollm3": _decoder,
    "gemma": _decoder,
    "gemma2": partial(_decoder, norms=4),
    "gemma3_text": partial(_decoder, norms=4, query_norm=True),
    "qwen3": partial(_decoder, query_norm=True),
    "qwen2": partial(_decoder, biases=(True, False)),
    "mistral": partial(_decoder, biases=(False, False)),
    "mixtral": partial(_decoder, biases=(False, False)),
    "nemotron_h": _nemotron_h,
    "granitemoehybrid": _granite_hybrid,
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
}

Row = tuple[int, int]  # tokens that a row reads, and those before them that are in its cache
Sharing = Literal["document", "rollout", "none"]
"""How often a prefix is computed.

- document: once for all positions of its window, in the rollout and again, forward and backward, in the update
- rollout: once a position in the rollout, once a thought in the update
- none: once a thought in both, as in trainers without shared prefixes
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of one step, or of several added up, by phase."""

    prefill: int = 0  # contexts, through the opening delimiter
    decode: int = 0  # thoughts, token by token
    score: int = 0  # tokens read after a thought, and everything read again (`Work.reread`) for its reward
    teacher: int = 0  # log p without a thought, by the teacher
    proxy: int = 0  # entropies that select positions
    reference: int = 0  # forward passes of the update: old log-probabilities, the KL reference
    update: int = 0  # forward and backward

    __add__ = _add

    @property
    def rollout(self) -> int:
        """`collect`: everything without gradients but the update's reference passes."""
        return self.prefill + self.decode + self.score + self.teacher + self.proxy

    @property
    def training(self) -> int:
        """The update."""
        return self.reference + self.update

    @property
    def total(self) -> int:
        """All phases."""
        return self.rollout + self.training


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The tokens of one step of RLP or RPT.

    Example: one window of 9 tokens, a position at t = 4, a template of 2 tokens before and 1 after, a delimiter of one
    token, two thoughts, of which the second was truncated: windows (9,), owners (0,), prefixes (6,), opening 2,
    thoughts ((3, 5),), tails ((0, 1),).
    """

    windows: tuple[int, ...]  # tokens of each window that the teacher reads: through its last target
    owners: tuple[int, ...]  # the window of each position
    prefixes: tuple[int, ...]  # of each position: tokens before it that the window's other positions may share
    opening: int  # tokens between a prefix and a thought: rest of the template, opening delimiter
    thoughts: tuple[tuple[int, ...], ...]  # of each position: sampled tokens of each thought
    tails: tuple[tuple[int, ...], ...]  # of each position and thought: tokens that the sampler reads after it; (): none
    sharing: Sharing = "document"
    reread: tuple[tuple[int, ...], ...] = ()  # the same where the policy reads everything again, as with vLLM
    horizon: int = 1  # targets of each position
    teacher: bool = True  # whether the teacher was queried
    kl: bool = False  # whether a KL reference was
    inner_steps: int = 1
    predicts: bool = False  # whether the targets after thoughts are trained
    written: tuple[tuple[int, ...], ...] = ()  # of each thought: tokens of its prediction, trained too (RPT)
    proxy: int = 0  # FLOPs of the proxy, which has its own shape
    supervised: tuple[int, ...] = ()  # lengths of rows for next-token training (Mixed, with inner_steps 0)


def pairs(tokens: int, past: int, window: int | None = None) -> int:
    """Keys that a row's tokens attend to, summed: token i of n attends to min(past + i, window), itself included."""
    growing = tokens if window is None else min(tokens, max(window - past, 0))
    return growing * past + growing * (growing + 1) // 2 + (tokens - growing) * (window or 0)


def forward_flops(shape: Shape, rows: Iterable[Row], head_rows: int, causal: bool = True) -> int:
    """FLOPs of reading rows in parallel, with logits at `head_rows` of their tokens.

    `causal` counts the pairs that attention and the scan need: the triangle below the diagonal, within the window.
    False counts what plain tensor code multiplies, masked or not: all queries with all keys, whole chunks, a group's B
    and C again for each of its heads. torch's counter sees that.
    """
    rows = list(rows)
    total = _linear_flops(shape, sum(tokens for tokens, _ in rows), head_rows)
    for one, layers in Counter(shape.attention).items():
        seen = sum(pairs(n, past, one.window) if causal else n * (past + n) for n, past in rows)
        total += layers * 4 * one.heads * one.head_dim * seen
    scan = _scan if causal else _padded_scan
    for one, layers in Counter(shape.mamba).items():
        total += layers * sum(scan(one, tokens) for tokens, _ in rows)
    return total


def backward_flops(shape: Shape, rows: Sequence[Row], head_rows: int, causal: bool = True) -> int:
    """FLOPs of the backward pass: twice those of `forward_flops`, less the gradients of frozen weights."""
    forward = forward_flops(shape, rows, head_rows, causal)
    if not shape.adapter:
        return 2 * forward
    tokens = sum(count for count, _ in rows)
    convolved = sum(
        2 * one.kernel * one.channels * (count + (0 if causal else one.kernel - 1))
        for one in shape.mamba
        for count, _ in rows
    )
    return 2 * forward - (_linear_flops(shape, tokens, head_rows) - 2 * tokens * shape.adapter + convolved)


def decode_flops(shape: Shape, rows: Iterable[Row]) -> int:
    """FLOPs of reading rows token by token with a cache, each token with its logits."""
    rows = list(rows)
    count = sum(tokens for tokens, _ in rows)
    recurrent = sum(4 * one.inner * one.state + 2 * one.kernel * one.channels for one in shape.mamba)
    return forward_flops(replace(shape, mamba=()), rows, count) + count * recurrent


def step_flops(shape: Shape, work: Work | tuple[int, ...]) -> Flops:
    """FLOPs of a training step: of work with thoughts, or of next-token training on rows of the given lengths."""
    return rlp_step(shape, work) if isinstance(work, Work) else cpt_step(shape, work)


def rlp_step(shape: Shape, work: Work, causal: bool = True) -> Flops:
    """FLOPs of one step of RLP (Algorithm 1) or RPT; `causal` as in `forward_flops`."""
    contexts = [prefix + work.opening for prefix in work.prefixes]
    thoughts = [(n, at) for lengths, at in zip(work.thoughts, contexts, strict=True) for n in lengths]
    targets = [n for position in work.reread or work.tails for n in position]
    prefill = {
        "document": _shared_rows(work) + [(work.opening, at - work.opening) for _, at in thoughts],
        "rollout": [(context, 0) for context in contexts],
        "none": [(context, 0) for _, context in thoughts],
    }[work.sharing]
    written = [n for position in work.written for n in position] or [0] * len(thoughts)
    sampled = [n + more for (n, _), more in zip(thoughts, written, strict=True)]
    rows = [n + tail + 1 for (n, _), tail in zip(thoughts, targets, strict=True)] if work.predicts else sampled
    scored = sum(sampled) + (work.horizon * len(rows) if work.predicts else 0)
    learned = _read_rows(work, rows, contexts)
    first = len(contexts) if work.sharing == "rollout" else len(thoughts)
    passes = work.kl + (work.inner_steps > 1)
    again = forward_flops(shape, _read_rows(work, sampled, contexts), sum(sampled), causal) if passes else 0
    teacher = forward_flops(shape, [(n, 0) for n in work.windows], work.horizon * len(contexts), causal)
    return Flops(
        prefill=forward_flops(shape, prefill, first, causal),
        decode=decode_flops(shape, thoughts),
        score=_score(shape, work, thoughts, causal),
        teacher=teacher if work.teacher else 0,
        proxy=work.proxy,
        reference=passes * again,
        update=work.inner_steps * _training_flops(shape, learned, scored, causal)
        + cpt_step(shape, work.supervised, causal).update,
    )


def cpt_step(shape: Shape, rows: Sequence[int], causal: bool = True) -> Flops:
    """FLOPs of next-token training (eq. 1) on rows of the given lengths; each row's first token is not predicted."""
    read, scored = [(n, 0) for n in rows], sum(n - 1 for n in rows)
    return Flops(update=_training_flops(shape, read, scored, causal))


def equal_flops_steps(shape: Shape, flops: int, rows: Sequence[int]) -> int:
    """Steps of next-token training on such rows whose FLOPs are closest to `flops`; at least 1."""
    return max(1, round(flops / cpt_step(shape, rows).total))


def t_flop(n: int, l_seq: int, bs: int, iters: int, t_inp: int) -> int:
    """The paper's estimate of RLP's compute, in tokens: T_flop = n * l_seq * bs * iters + T_inp.

    `n` thoughts a position, sequences of `l_seq` tokens, `bs` positions a step, `iters` steps, `t_inp` tokens of text.
    """
    return n * l_seq * bs * iters + t_inp


def _score(shape: Shape, work: Work, thoughts: Sequence[Row], causal: bool) -> int:
    """`thoughts`: their tokens and those before them."""
    tails = [n for position in work.tails for n in position] or [0] * len(thoughts)
    total = decode_flops(shape, [(tail, at + n) for tail, (n, at) in zip(tails, thoughts, strict=True)])
    if work.reread:
        again = [n for position in work.reread for n in position]
        lengths = [n + tail + 1 for tail, (n, _) in zip(again, thoughts, strict=True)]
        rows = _read_rows(work, lengths, [prefix + work.opening for prefix in work.prefixes])
        total += forward_flops(shape, rows, work.horizon * len(thoughts), causal)
    return total


def _linear_flops(shape: Shape, tokens: int, head_rows: int) -> int:
    return 2 * (tokens * shape.matmul_weights + head_rows * shape.hidden * shape.vocab)


def _training_flops(shape: Shape, rows: Sequence[Row], head_rows: int, causal: bool) -> int:
    return forward_flops(shape, rows, head_rows, causal) + backward_flops(shape, rows, head_rows, causal)


def _read_rows(work: Work, lengths: Sequence[int], contexts: Sequence[int]) -> list[Row]:
    """What the update reads, where a row of the given length follows the opening delimiter of each thought."""
    after = [at for at, some in zip(contexts, work.thoughts, strict=True) for _ in some]
    if work.sharing != "document":
        return [(n + at, 0) for n, at in zip(lengths, after, strict=True)]
    return _shared_rows(work) + [(n + work.opening, at - work.opening) for n, at in zip(lengths, after, strict=True)]


def _shared_rows(work: Work) -> list[Row]:
    """Each window's longest prefix."""
    longest: dict[int, int] = {}
    for owner, prefix in zip(work.owners, work.prefixes, strict=True):
        longest[owner] = max(prefix, longest.get(owner, 0))
    return [(prefix, 0) for prefix in longest.values()]


def _scan(one: Mamba, tokens: int) -> int:
    """Convolution and chunked scan of one row: pairs within a chunk, every token into and out of the state."""
    chunks, rest = divmod(tokens, one.chunk)
    within = (chunks * pairs(one.chunk, 0) + pairs(rest, 0)) * 2 * (one.groups * one.state + one.inner)
    across = (4 * tokens + 2 * (chunks + bool(rest))) * one.inner * one.state
    return within + across + 2 * one.kernel * one.channels * tokens


def _padded_scan(one: Mamba, tokens: int) -> int:
    """The same as transformers' plain code multiplies it: whole chunks, each head separately, all pairs of chunks."""
    chunks = -(-tokens // one.chunk)
    within = chunks * one.chunk**2 * 2 * (one.heads * one.state + one.inner)
    across = (4 * chunks * one.chunk + 2 * (chunks + 1) ** 2) * one.inner * one.state
    return within + across + 2 * one.kernel * one.channels * (tokens + one.kernel - 1)
