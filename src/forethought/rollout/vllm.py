"""Thoughts from vLLM, in the same process and on the same device as the policy (docs/vllm.md).

Token ids go in and come out. Requests are sampled by vLLM, which returns the log-probabilities of the tokens; the
evidence is computed by the policy. vLLM stops at given tokens and masks them at first; from that, `think` makes
thoughts that end with the text of the closing delimiter, and not before method.min_thought_length tokens. After each
optimizer step the policy's weights are loaded in place, and a probe must then agree with the policy.
"""

import copy
import hashlib
import importlib
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from forethought.config import Config, RunError, UserError
from forethought.data.positions import Positions, ThoughtFormat, pad_rows
from forethought.data.token_bytes import Closing
from forethought.models.logprobs import log_probabilities
from forethought.models.lora import merged_weights
from forethought.rollout import Thoughts, rescored

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights need not be sent anywhere
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_PROBE = 32  # tokens
_BOUND = {"float32": 1e-3, "bfloat16": 0.2}  # largest difference of engine and policy on the probe, nats per token
_ENGINES: list[Any] = []  # kept alive: they share process groups, which the first one destroyed would take from all
_UNMOVED = 1e-4  # nats per token that the policy may move on the probe while vLLM does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and the samples that are requested after it."""

    prompt: list[int]
    samples: int
    limit: int  # longest sample, in tokens
    stops: list[int]  # a sample ends with one of these tokens
    shortest: int  # which are masked until it has so many tokens
    seed: int  # of the first sample; the others' follow from it


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sampled tokens, with the one that ended the sample."""

    tokens: list[int]
    logp: list[float]  # of each token, by the engine, at its temperature, nats

    def __add__(self, more: "Sample") -> "Sample":
        return Sample(tokens=self.tokens + more.tokens, logp=self.logp + more.logp)


Draw = Callable[[list[Request]], list[list[Sample]]]  # the samples of each request


def think(
    prompts: Sequence[list[int]], noise: Float[Tensor, "batch group thought"], closing: Closing, draw: Draw
) -> list[Sample]:
    """A group of thoughts after each prompt, position by position; the noise determines the seeds alone.

    The first request stops at the tokens with which the delimiter begins. Where they do not close a thought, it is
    continued by requests of its own, which stop at any token that may, until it is closed or full. What was sampled
    after the text of the delimiter was complete is dropped.
    """
    group, limit = noise.shape[1:]
    first = [
        Request(
            prompt=list(prompt),
            samples=group,
            limit=limit,
            stops=closing.early.tolist(),
            shortest=closing.shortest,
            seed=seed(own),
        )
        for prompt, own in zip(prompts, noise, strict=True)
    ]
    rows = [ended(sample, closing) for found in draw(first) for sample in found]
    own, turn = noise.flatten(0, 1), 0
    while unfinished := [i for i, row in enumerate(rows) if not closed(row, closing) and len(row.tokens) < limit]:
        turn += 1
        more = [
            Request(
                prompt=[*prompts[i // group], *rows[i].tokens],
                samples=1,
                limit=limit - len(rows[i].tokens),
                stops=closing.ending.tolist(),
                shortest=0,
                seed=seed(own[i], turn),
            )
            for i in unfinished
        ]
        for i, (sample,) in zip(unfinished, draw(more), strict=True):
            rows[i] = ended(rows[i] + sample, closing)
    return rows


def seed(noise: Float[Tensor, "..."], turn: int = 0) -> int:
    """A seed below 2^62 from uniform numbers, which are a function of (run's seed, step, position, member)."""
    digest = hashlib.blake2b(noise.contiguous().numpy().tobytes() + bytes([turn % 256]), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def closed(row: Sample, closing: Closing) -> bool:
    """Whether the text of a thought contains the closing delimiter."""
    return closing.length(row.tokens) is not None


def ended(row: Sample, closing: Closing) -> Sample:
    """A thought up to the token that closes it."""
    length = closing.length(row.tokens)
    return Sample(tokens=row.tokens[:length], logp=row.logp[:length])


def as_thoughts(rows: Sequence[Sample], form: ThoughtFormat, shape: tuple[int, int], device: Any) -> Thoughts:
    """Samples as `Thoughts` at `shape` (positions, horizon); their evidence, all 0, is still to be computed."""
    batch, horizon = shape
    tokens, mask = pad_rows([row.tokens for row in rows], form.pad, left=False)
    logp = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor([x for row in rows for x in row.logp]))
    evidence = torch.zeros(batch, len(rows) // batch, horizon, device=device)
    return Thoughts(
        tokens=tokens.view(*evidence.shape[:2], -1).to(device),
        mask=mask.view(*evidence.shape[:2], -1).to(device),
        closed=torch.tensor([closed(row, form.closing) for row in rows], device=device).view(evidence.shape[:2]),
        logp=logp.view(*evidence.shape[:2], -1).to(device),
        evidence=evidence,
        hit=evidence.bool(),
    )


class Caller:
    """Runs calls in a thread of its own, with a timeout."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._stuck = ""
        threading.Thread(target=self._work, name="vllm", daemon=True).start()

    def call(self, name: str, function: Callable[[], Any]) -> Any:
        """The result of `function`. Raises RunError if it raises or times out, or if an earlier call has not ended."""
        if self._stuck:
            raise RunError(f"rollout.engine = 'vllm': {self._stuck} has not ended, so {name} cannot begin")
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks.put((function, answer))
        try:
            value, error = answer.get(timeout=self.timeout_s)
        except queue.Empty:
            self._stuck = name
            raise RunError(
                f"rollout.engine = 'vllm': {name} takes longer than rollout.timeout_s = {self.timeout_s:g} s; "
                "vLLM hangs or needs more time; the last checkpoint is complete"
            ) from None
        if error is not None:
            text = " ".join(str(error).split()) or "no message"
            raise RunError(
                f"rollout.engine = 'vllm': {name} failed with {type(error).__name__}: {text[:300]}; "
                "the last checkpoint is complete"
            ) from error
        return value

    def _work(self) -> None:
        while True:
            function, answer = self._tasks.get()
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))


class VLLMEngine:
    """Samples with vLLM and scores with the policy. `start` creates one."""

    def __init__(self, policy: Any, form: ThoughtFormat, config: Config, vllm: Any, options: dict[str, Any]):
        self.policy, self.form, self.config, self.vllm = policy, form, config, vllm
        size, head = policy.get_input_embeddings().num_embeddings, policy.get_output_embeddings().weight.shape[0]
        # tokens without a text, which the trainer's log-probabilities leave out; -100 is the lowest that vLLM takes
        self.never = dict.fromkeys([*form.holes, *range(form.vocabulary or head, head)], -100.0) or None
        self.head = head
        self.probe = [i % size for i in range(7, 7 + min(_PROBE, options["max_model_len"] - 1))]
        self.bound = _BOUND[options["dtype"]]
        self.answers: tuple[Tensor, Tensor] | None = None  # of the policy and of vLLM to the last probe
        self.caller = Caller(config.rollout.timeout_s)
        try:
            self.llm = self.caller.call("the start", lambda: vllm.LLM(**options))
        except RunError as error:
            raise UserError(str(error).partition("; the last checkpoint")[0]) from error
        _ENGINES.append(self.llm)
        self.sync()

    @torch.no_grad()
    def sample(self, positions: Positions, noise: Float[Tensor, "batch group thought"]) -> Thoughts:
        """Sample with vLLM, force the closing delimiter where needed, and score the targets with the policy."""
        prompts = [self.form.prompt_tokens(context) for context in positions.contexts()]
        rows = think(prompts, noise, self.form.closing, self._draw)
        thoughts = as_thoughts(rows, self.form, (len(positions), positions.horizon), self.policy.device)
        return rescored(thoughts, positions, self.policy, self.form, self.config)

    @torch.no_grad()
    def sync(self) -> None:
        """Load the policy's weights in place. Raises RunError if a probe then disagrees with the policy."""
        own = merged_weights(self.policy, dict(self.policy.named_parameters()), self.config.lora)
        weights = revert_weight_conversion(self.policy, own)
        self.caller.call("loading the new weights", lambda: self._reload(list(weights.items())))
        tokens = torch.tensor(self.probe, device=self.policy.device)
        logits = self.policy(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        answers = log_probabilities(logits, tokens[1:]).cpu(), self.caller.call("a probe", self._answer)
        if wrong := difference(answers, self.answers, self.bound):
            raise RunError(f"rollout.engine = 'vllm': {wrong}; the last checkpoint is complete")
        self.answers = answers

    def _reload(self, weights: list[tuple[str, Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the old weights could not be reset")

    def _answer(self) -> Float[Tensor, " token"]:
        """log p of the probe's tokens from the second on, by vLLM."""
        sampling = self.vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        found = self.llm.generate([{"prompt_token_ids": self.probe}], sampling, use_tqdm=False)[0].prompt_logprobs
        return torch.tensor([here[token].logprob for here, token in zip(found[1:], self.probe[1:], strict=True)])

    def _draw(self, requests: list[Request]) -> list[list[Sample]]:
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        sampling = [self._sampling(request) for request in requests]
        found = self.caller.call("sampling", lambda: self.llm.generate(prompts, sampling, use_tqdm=False))
        return [[_sample(one) for one in sorted(some.outputs, key=lambda one: one.index)] for some in found]

    def _sampling(self, request: Request) -> Any:
        return self.vllm.SamplingParams(
            n=request.samples,
            seed=request.seed,
            temperature=self.config.method.temperature,
            max_tokens=request.limit,
            min_tokens=request.shortest,
            stop_token_ids=[token for token in request.stops if token < self.head],
            logit_bias=self.never,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )


def start(policy: Any, form: ThoughtFormat, config: Config) -> VLLMEngine:
    """An engine with the policy's weights. Raises UserError if vLLM is not installed or does not support the model."""
    os.environ.update(_ENVIRONMENT)
    try:
        vllm = importlib.import_module("vllm")
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"rollout.engine = 'vllm': vLLM cannot be imported ({text}); docs/vllm.md installs it"
        ) from error
    architecture = copy.deepcopy(policy.config)
    architecture.architectures = [type(policy).__name__]
    with tempfile.TemporaryDirectory() as folder:
        architecture.save_pretrained(folder)
        options = {
            "model": folder,
            "runner": "generate",
            "load_format": "dummy",  # the policy's weights follow
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model's own
            "dtype": "bfloat16" if config.rollout.precision == "bf16" or policy.dtype == torch.bfloat16 else "float32",
            "enable_prefix_caching": True,
            "enable_chunked_prefill": policy.device.type != "cpu",  # vLLM 0.32 on a CPU fails to split seeded prompts
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature
            "max_model_len": config.corpus.window + form.overhead + config.method.thought_length,
            "max_num_seqs": config.train.rows,
            "kv_cache_memory_bytes": int(config.rollout.cache_gb * 2**30),
        }
        return VLLMEngine(policy, form, config, vllm, options)


def difference(
    now: tuple[Float[Tensor, " token"], Float[Tensor, " token"]],
    before: tuple[Float[Tensor, " token"], Float[Tensor, " token"]] | None,
    bound: float,
) -> str:
    """What is wrong with the answers of policy and vLLM to a probe, given those to the last one; "" if nothing."""
    gap = float((now[0] - now[1]).abs().mean())
    if not gap <= bound:
        return f"after loading the new weights a probe differs from the policy by {gap:.2g} nats per token"
    if before is not None and torch.equal(now[1], before[1]):
        moved = float((now[0] - before[0]).abs().mean())
        if moved > _UNMOVED:
            return f"the new weights were not loaded: the policy moved by {moved:.2g} nats per token on a probe"
    return ""


def _sample(output: Any) -> Sample:
    tokens = list(output.token_ids)
    return Sample(
        tokens=tokens, logp=[here[token].logprob for here, token in zip(output.logprobs, tokens, strict=True)]
    )
