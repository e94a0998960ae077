"""lm-evaluation-harness: a model type `forethought` that thinks before it answers, so that any of its tasks runs.

    forethought lm-eval --model_args path=RUN/policy,thoughts=4 --tasks arc_easy

The harness knows only the model types of its own list and loads no plugins; this command adds ours and hands over.
"""
# pyright: reportMissingImports=false

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from forethought.config import UserError, merge
from forethought.inference import Pair, ThinkingModel
from forethought.rollout.native import Sampling
from forethought.tools.questions.questions import before, stop_at

_KNOWN = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}


@register_model("forethought")
class ForethoughtLM(TemplateLM):
    """A ThinkingModel for the harness.

    - `loglikelihood`: k thoughts behind the context; the continuation's probability is its mean over them. The choices
      of a question are scored after the same thoughts.
    - `loglikelihood_rolling`: thinks before every `think_every`-th token of the text.
    - `generate_until`: thinks once, then writes. Only what is written behind the thought is the answer.

    The same seed gives the same results, whatever the batch size.
    """

    def __init__(
        self,
        path: str,
        thoughts: int = 1,
        thinking: bool = True,
        think_every: int = 1,
        seed: int = 0,
        **options: Any,
    ):
        """`path` is what ThinkingModel.load takes. `thinking=False` is the same model without a thought.

        `options` are the harness's own batch_size (thoughts decoded at once), device and max_gen_toks, and any option
        of Forethought by its whole name, such as method.thought_length=64. Raises UserError.
        """
        super().__init__()
        if thoughts < 1 or think_every < 1:
            raise UserError(f"thoughts = {thoughts}, think_every = {think_every}: must be at least 1")
        self.max_gen_toks = int(options.pop("max_gen_toks", 256))
        self.path, self.thoughts, self.think_every, self.seed = path, thoughts if thinking else 0, think_every, seed
        self.thinker = ThinkingModel.load(path, _overrides(options))
        self.tokenizer = self.thinker.tokenizer
        self._device = self.thinker.model.device

    @property
    def max_length(self) -> int:
        """Tokens of text that a row can hold beside a thought."""
        return self.thinker.max_text_tokens(self.thoughts)

    @property
    def eot_token_id(self) -> int:
        """What ends a text; where the tokenizer has no such token, what begins one."""
        return self._special("eos_token_id", "bos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the token that begins one, where there is one."""
        return self._special("bos_token_id", "eos_token_id")

    def _special(self, *names: str) -> int:
        found = [token for name in names if (token := getattr(self.tokenizer, name)) is not None]
        if not found:
            raise UserError(f"path = {self.path!r}: its tokenizer has no token that begins or ends a text")
        return found[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens, by default with the special ones that documents had in training, but never a second BOS."""
        begins = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, truncation=False, verbose=False)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            scores = self.thinker.score(pairs, thoughts=self.thoughts, seed=self.seed, progress=bar.update)
        for (asked, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", asked, score)
        return scores

    def _fitting(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair without the oldest tokens of a context that is too long."""
        room = self.max_length - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation)} tokens: the model has room for {self.max_length - 1}"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text from its first token on, in windows where it is longer than the model."""
        totals = []
        for (text,) in tqdm([one.args for one in requests], disable=disable_tqdm, desc="Running rolling requests"):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - self.think_every, 1)
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                total += self.thinker.log_likelihood(
                    [*context, *continuation],
                    thoughts=self.thoughts,
                    think_every=self.think_every,
                    given=len(context),
                    seed=self.seed,
                )
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first of the strings that end it."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            asked: list[Any] = [one.args for one in requests]
            for batch, sampling, until in self._batches(asked):
                contexts = [
                    self.tok_encode(requests[i].args[0])[-(self.max_length - sampling.limit) :] for i, _ in batch
                ]
                stop = stop_at(self.tokenizer, until, self.thinker.ends)
                seeds = [self.seed + turn for _, turn in batch]
                found = self.thinker.answer(contexts, sampling, stop, seeds, thoughts=self.thoughts)
                for (i, _), tokens in zip(batch, found, strict=True):
                    answers[i] = before(self.tokenizer.decode(tokens, skip_special_tokens=True), until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update(len(batch))
        return answers

    def _batches(
        self, asked: Sequence[tuple[str, dict[str, Any]]]
    ) -> Iterator[tuple[list[tuple[int, int]], Sampling, list[str]]]:
        """Requests that are answered together: their indices, each with its turn among equal ones; how to answer."""
        groups: dict[str, list[tuple[int, int]]] = {}
        seen: Counter[str] = Counter()
        for i, (context, options) in enumerate(asked):
            groups.setdefault(repr(sorted(options.items())), []).append((i, seen[context]))
            seen[context] += 1
        size = self.thinker.config.train.rollout_batch
        for members in groups.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(asked[members[0][0]][1], self.max_gen_toks))
            if odd := sorted(options.keys() - _KNOWN):
                raise UserError(f"generation options {', '.join(odd)}: must be among {', '.join(sorted(_KNOWN))}")
            limit = options["max_gen_toks"]
            if limit >= self.max_length:
                raise UserError(
                    f"max_gen_toks = {limit}: must be below the {self.max_length} tokens that a text may have"
                )
            temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
            sampling = Sampling(limit=limit, temperature=temperature, top_p=options.get("top_p", 1.0), rows=size)
            members.sort(key=lambda one: -len(asked[one[0]][0]))
            for start in range(0, len(members), size):
                yield members[start : start + size], sampling, list(options.get("until", []))

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """By the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Nested options of Forethought from the harness's flat ones."""
    batch, device = options.pop("batch_size", None), options.pop("device", None)
    options.pop("max_batch_size", None)
    values: dict[str, Any] = {}
    if batch not in (None, "auto"):
        values = merge(values, {"train": {"rollout_batch": int(batch)}})
    if device is not None:  # the harness asks for a GPU wherever the user names nothing
        kind = str(device).partition(":")[0]
        values = merge(values, {"model": {"device": "auto" if kind == "cuda" else kind}})
    for option, value in options.items():
        nested = value
        for name in reversed(option.split(".")):
            nested = {name: nested}
        values = merge(values, nested)
    return values


def main(words: Sequence[str]) -> None:
    """The harness's own command line, `--model forethought` unless another model type is named."""
    words = list(words)
    runs = not words or words[0].startswith("--") or words[0] == "run"
    if runs and len(words) > 1 and not any(word.partition("=")[0] in ("--model", "-M") for word in words):
        words += ["--model", "forethought"]
    sys.argv = ["forethought lm-eval", *words]
    cli_evaluate()
