"""Thoughts from vLLM, in the same process and on the same device as the policy (docs/vllm.md). The only user of vLLM.

Token ids go in and come out. vLLM tells the log-probabilities of what it sampled; the evidence, which it does not tell,
is read off the policy. After every step the policy's weights are loaded in place, and a probe must then give what the
policy gives.
"""

import copy
import importlib
import os
import queue
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from forethought.config import Config, RunError, UserError
from forethought.data.positions import Positions, ThoughtFormat, pad_rows
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, chunk_tokens, log_probabilities, target_logp
from forethought.models.lora import merged_weights
from forethought.rollout import Thoughts
from forethought.rollout.requests import Request, Sample, as_thoughts, read_back, think

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights need not be sent anywhere
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_PROBE = 32  # tokens
_BOUND = {"float32": 1e-3, "bfloat16": 0.2}  # nats a token that engine and policy may differ by on the probe
_KEPT: list[Any] = []  # vLLM's engines share groups of the process, which the death of one would take from all
_STILL = 1e-4  # nats a token that a policy may move without the engine's answer changing


class Caller:
    """Makes calls in a thread of its own and waits for each, for so long and no longer."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._stuck = ""
        threading.Thread(target=self._work, name="vllm", daemon=True).start()

    def call(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function` returns. Raises RunError if it raises, takes too long, or an earlier call never ended."""
        if self._stuck:
            raise RunError(f"rollout.engine = 'vllm': {self._stuck} never ended, so {name} cannot begin")
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks.put((function, answer))
        try:
            value, error = answer.get(timeout=self.timeout_s)
        except queue.Empty:
            self._stuck = name
            raise RunError(
                f"rollout.engine = 'vllm': {name} takes longer than rollout.timeout_s = {self.timeout_s:g} s; "
                "vLLM hangs, or needs more time; the last checkpoint is whole"
            ) from None
        if error is not None:
            text = " ".join(str(error).split()) or "no reason given"
            raise RunError(
                f"rollout.engine = 'vllm': {name} failed with {type(error).__name__}: {text[:300]}; "
                "the last checkpoint is whole"
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
    """Samples with vLLM and scores with the policy. `start` makes one."""

    def __init__(self, policy: Any, form: ThoughtFormat, config: Config, vllm: Any, options: dict[str, Any]):
        self.policy, self.form, self.config, self.vllm = policy, form, config, vllm
        self.reading = ScoringOptions(
            temperature=1.0,
            tokens=chunk_tokens(policy, config.update.tokens_per_chunk),
            shared=config.model.prefix == "shared",
        )
        size = policy.get_input_embeddings().num_embeddings
        self.probe = [i % size for i in range(7, 7 + min(_PROBE, options["max_model_len"] - 1))]
        self.bound = _BOUND[options["dtype"]]
        self.answers: tuple[Tensor, Tensor] | None = None  # the policy's and vLLM's to the last probe
        self.caller = Caller(config.rollout.timeout_s)
        try:
            self.llm = self.caller.call("the start", lambda: vllm.LLM(**options))
        except RunError as error:
            raise UserError(str(error).partition("; the last checkpoint")[0]) from error
        _KEPT.append(self.llm)
        self.sync()

    @torch.no_grad()
    def sample(self, positions: Positions, noise: Float[Tensor, "batch group thought"]) -> Thoughts:
        """Sample with vLLM, close by force where needed, and read log p of the targets off the policy."""
        prompts = [self.form.prompt_tokens(context) for context in positions.contexts()]
        rows = think(prompts, noise, self.form.close, self._draw)
        return as_thoughts(rows, self.form, *self._evidence(positions, rows, noise.shape[1]))

    @torch.no_grad()
    def sync(self) -> None:
        """Load the policy's weights in place. Raises RunError where a probe then tells of others."""
        own = merged_weights(self.policy, dict(self.policy.named_parameters()), self.config.lora)
        weights = revert_weight_conversion(self.policy, own)
        self.caller.call("loading the new weights", lambda: self._reload(list(weights.items())))
        tokens = torch.tensor(self.probe, device=self.policy.device)
        logits = self.policy(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        answers = log_probabilities(logits, tokens[1:]).cpu(), self.caller.call("a probe", self._answer)
        if wrong := difference(answers, self.answers, self.bound):
            raise RunError(f"rollout.engine = 'vllm': {wrong}; the last checkpoint is whole")
        self.answers = answers

    def _reload(self, weights: list[tuple[str, Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the cache of prefixes, which the old weights computed, could not be emptied")

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
            min_tokens=0 if request.open_end else 1,
            stop_token_ids=[request.stop],
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )

    def _evidence(
        self, positions: Positions, rows: list[Sample], group: int
    ) -> tuple[Float[Tensor, "batch group horizon"], Bool[Tensor, "batch group horizon"]]:
        """Of all targets, some whole documents at a time."""
        texts = read_back(rows, self.form.close, positions.targets().tolist())
        longest, device = max(len(window.tokens) for window in positions.windows), self.policy.device
        places, parts, start = self.config.method.positions, [], 0
        for chunk in positions.chunks(max(1, places * (self.reading.tokens // longest))):
            tokens, mask = pad_rows(texts[start : start + len(chunk) * group], self.form.pad, left=False)
            tokens, mask = (some.view(len(chunk), group, -1).to(device) for some in (tokens, mask))
            again = ThoughtBatch.from_positions(self.form, chunk, tokens, mask)
            parts.append(target_logp(self.policy, self.form, again, positions.horizon, self.reading))
            start += len(chunk) * group
        evidence, hit = (torch.cat(some).view(len(positions), group, -1) for some in zip(*parts, strict=True))
        return evidence, hit


def start(policy: Any, form: ThoughtFormat, config: Config) -> VLLMEngine:
    """An engine with the policy's weights. Raises UserError where vLLM is not there or will not take the model."""
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
            "load_format": "dummy",  # no weights: those of the policy follow
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # nothing from the model's own
            "dtype": {torch.float32: "float32", torch.bfloat16: "bfloat16"}[policy.dtype],
            "enable_prefix_caching": True,
            "enable_chunked_prefill": policy.device.type != "cpu",  # on a CPU 0.32 fails where a seeded prompt is cut
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature
            "max_model_len": config.corpus.window + form.overhead + config.method.thought_length,
            "max_num_seqs": config.train.rollout_batch,
            "kv_cache_memory_bytes": int(config.rollout.cache_gb * 2**30),
        }
        return VLLMEngine(policy, form, config, vllm, options)


def difference(
    now: tuple[Float[Tensor, " token"], Float[Tensor, " token"]],
    before: tuple[Float[Tensor, " token"], Float[Tensor, " token"]] | None,
    bound: float,
) -> str:
    """What is wrong with the answers of policy and vLLM to one probe, given those of the last one; empty: nothing."""
    gap = float((now[0] - now[1]).abs().mean())
    if not gap <= bound:
        return f"after loading the new weights a probe differs by {gap:.2g} nats a token from the policy's"
    if before is not None and torch.equal(now[1], before[1]):
        moved = float((now[0] - before[0]).abs().mean())
        if moved > _STILL:
            return f"the new weights were not taken: the policy moved by {moved:.2g} nats a token on a probe"
    return ""


def _sample(output: Any) -> Sample:
    tokens = list(output.token_ids)
    return Sample(
        tokens=tokens, logp=[here[token].logprob for here, token in zip(output.logprobs, tokens, strict=True)]
    )
