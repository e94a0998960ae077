"""Tiny models of random weights, a word tokenizer, and plain one-row forwards to compare everything with."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forethought.algo.cpt import CPT
from forethought.algo.metrics import Sums
from forethought.algo.policy_gradient import Microbatch
from forethought.algo.rlp import RLP
from forethought.algo.rpt import RPT
from forethought.config import Config, Method, Model, Train, Update
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat
from forethought.data.token_bytes import Closing
from forethought.models.compute_copy import Network
from forethought.prefix import enable
from forethought.rollout.native import NativeEngine

WORDS = ("<pad>", "<unk>", "<bos>", "<think>", "</think>", "a", "b", "c", "d", "e", "f", "g")
OPEN, CLOSE, A = 3, 4, 5
FORM = ThoughtFormat(before=(), after=(), open=(OPEN,), close=(CLOSE,), bos=None, pad=0)
LONG = ThoughtFormat(before=(6, 7), after=(8,), open=(OPEN, 5, 6), close=(CLOSE, 5, 5), bos=2, pad=0)
REPEATING = ThoughtFormat(before=(6,), after=(8,), open=(OPEN,), close=(CLOSE, 5), bos=2, pad=0, repeat=3)
TEXTS = ("", "?", "!", "<think>", "</", "think>", ">b", "<", "/think>", "so</think>.", "thi", "think>n")
"""Texts of the same tokens, many of which may take part in the delimiter </think>."""
MERGED = ThoughtFormat(
    before=(6,),
    after=(),
    open=(OPEN,),
    close=(CLOSE, A),
    bos=2,
    pad=0,
    closing=Closing([*TEXTS, ""], "</think>", (CLOSE, A)),
)


def word_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>"} | ({"bos_token": "<bos>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=plain, **names)


def perturbed(build: Any, architecture: Any, seed: int, scale: float) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build(architecture)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    enable(model.eval())
    return model


def qwen3(vocab: int = len(WORDS), seed: int = 0, width: int = 32, tied: bool = False, scale: float = 0.3) -> Any:
    architecture = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return perturbed(Qwen3ForCausalLM, architecture, seed, scale)


def gpt2() -> Any:
    """With learned positions: a row that is padded on the left and numbered from its padding on would score wrongly."""
    architecture = GPT2Config(
        vocab_size=len(WORDS), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=0
    )
    return perturbed(GPT2LMHeadModel, architecture, 0, 0.1)


def nemotron_h() -> Any:
    architecture = NemotronHConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=4,
        mamba_proj_bias=False,
    )
    return perturbed(NemotronHForCausalLM, architecture, 0, 0.1)


def granite() -> Any:
    architecture = GraniteMoeHybridConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        shared_intermediate_size=32,
        num_local_experts=0,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=4,
    )
    return perturbed(GraniteMoeHybridForCausalLM, architecture, 0, 0.1)


MODELS = {"qwen3": qwen3, "gpt2": gpt2, "nemotron_h": nemotron_h, "granitemoehybrid": granite}


def window(*tokens: int, marks: tuple[int, ...] = ()) -> Window:
    return Window(document="d", start=0, tokens=list(tokens), marks={"answer": marks} if marks else {})


WINDOWS = [window(5, 6, 7, 8, 9), window(9, 10, 5, 7, 11, 6, 8), window(11, 8, 10), window(6, 6, 9, 5)]


def config(
    batch: int = 4,
    tokens: int = 0,
    rows: int = 64,
    seed: int = 0,
    prefix: Literal["shared", "replicated"] = "shared",
    **method: Any,
) -> Config:
    """`tokens` go through one forward and backward pass, `rows` thoughts decode at once."""
    small: dict[str, Any] = {"group": 4, "thought_length": 5} | method
    return Config(
        seed=seed,
        model=Model(prefix=prefix),
        method=Method(**small),
        train=Train(batch=batch, rollout_batch=rows),
        update=Update(tokens_per_chunk=tokens),
    )


def engine(model: Any, settings: Config, form: ThoughtFormat = FORM) -> NativeEngine:
    shared = settings.model.prefix == "shared"
    return NativeEngine(model, form, settings.method, settings.train.rollout_batch, shared)


def rlp(model: Any, settings: Config, form: ThoughtFormat = FORM) -> RLP:
    network = Network(model, settings.model.precision)
    return RLP(network, engine(network.model, settings, form), form, word_tokenizer(), settings)


def cpt(model: Any, settings: Config, form: ThoughtFormat = FORM) -> CPT:
    network = Network(model, settings.model.precision)
    return CPT(network, engine(network.model, settings, form), form, word_tokenizer(), settings)


@dataclasses.dataclass(frozen=True)
class Collected:
    """What the trainer makes of a step's record."""

    microbatches: list[Any]
    metrics: Sums
    rows: list[dict[str, Any]]  # of thoughts.jsonl, two positions
    work: Any


def collected(method: Any, windows: list[Window], step: int) -> Collected:
    """One step of a method, up to the backward pass."""
    record = method.collect(windows, step)
    text, rows = record.text(word_tokenizer(), method.form, 2)
    work = record.work(method.form, method.config)
    return Collected(list(method.microbatches(record)), record.metrics() | text, rows, work)


def written(piece: Microbatch, form: ThoughtFormat = FORM) -> list[tuple[list[int], list[int]]]:
    """What stands ahead of each thought, and its sampled tokens, row by row."""
    rows = piece.batch
    prompts = rows.prompts(form)
    return [
        (prompts[i], tokens[mask].tolist())
        for i, tokens, mask in zip(rows.position_index.tolist(), rows.tokens, rows.mask, strict=True)
    ]


def gradients(model: Any, *losses: torch.Tensor) -> list[torch.Tensor]:
    """Of the sum of the losses, for every parameter; zeros where there is none."""
    total = torch.stack(losses).sum()
    return list(torch.autograd.grad(total, list(model.parameters()), retain_graph=True, materialize_grads=True))


def update(method: RLP | RPT | CPT, pieces: Sequence[Any]) -> list[torch.Tensor]:
    """What the method adds to the gradient of every parameter over some pieces; zeros where there is nothing."""
    parameters = list(method.network.weights.parameters())
    method.network.weights.zero_grad()
    for piece in pieces:
        method.forward_backward(piece)
    slopes = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    method.network.weights.zero_grad()
    return slopes


def assert_close(got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest number there is, which must not be zero."""
    largest = max(float(one.abs().max()) for one in wanted)
    assert largest > 0
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).abs().max()) <= tolerance * largest


def plain_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after each token of one row: no mask, no cache, no padding."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def patient(form: ThoughtFormat, shortest: int) -> ThoughtFormat:
    """The same format for thoughts of at least so many tokens."""
    return dataclasses.replace(form, closing=form.closing.with_minimum(shortest))


def plain_thought(
    model: Any, prompt: list[int], thought: list[int], temperature: float, close: Any, shortest: int = 1
) -> torch.Tensor:
    """log pi of each token of a thought, whose first `shortest` are none of `close`, by one plain forward."""
    logits = plain_logits(model, prompt + thought)[len(prompt) - 1 : -1] / temperature
    early = torch.arange(min(shortest, len(logits)))[:, None], torch.tensor(close).view(1, -1)
    logits = logits.index_put(early, torch.tensor(-torch.inf, dtype=logits.dtype))
    return logits.log_softmax(-1).gather(-1, torch.tensor(thought)[:, None]).squeeze(-1)


def plain_targets(model: Any, prompt: list[int], targets: list[int]) -> torch.Tensor:
    """log p of each target after the prompt at temperature 1, by one plain forward."""
    logits = plain_logits(model, prompt + targets)[len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None]).squeeze(-1)


def closed_by_force(thought: list[int], form: ThoughtFormat) -> list[int]:
    """A thought with its closing delimiter, added if it has not closed itself."""
    size = len(form.close)
    if form is MERGED and "</think>" in "".join(TEXTS[token] for token in thought):
        begun = 1 if thought[-2:-1] == [CLOSE] else 0
        return [*thought[: len(thought) - 1 - begun], *form.close]
    ends = len(thought) > size and tuple(thought[-size:]) == form.close
    return thought if ends else [*thought, *form.close]


def read_through(thought: list[int], form: ThoughtFormat, context: list[int]) -> list[int]:
    """What is read between the opening delimiter and the text."""
    repeated = [([context[0]] * form.repeat + context)[-i] for i in range(form.repeat, 0, -1)]
    return [*closed_by_force(thought, form), *repeated]
