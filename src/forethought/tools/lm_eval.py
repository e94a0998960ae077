"""lm-evaluation-harness: the model type `forethought`, which thinks before it answers any of the harness's tasks.

    forethought lm-eval --model_args path=RUN/policy,thoughts=4 --tasks arc_easy

The harness has no plugins: this command registers the model type and calls the harness's own command line.
"""
# pyright: reportMissingImports=false

import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from forethought.config import UserError, read_overrides
from forethought.data.corpus import context_tokens
from forethought.inference import Answer, Sampling, ThinkingModel, thinking_rule

TASKS = Path(__file__).parent / "tasks"  # the task files of tools/benchmarks.py
_KNOWN = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}
_SEEDS = 2**32  # between the seeds of two samples: no sample of one seed is drawn like one of another seed


class Reply(str):
    """The text of an answer, which is all that the harness reads, with the rest of the answer."""

    answer: Answer


class BenchmarkTask(ConfigurableTask):
    """A task with up to `num_fewshot` worked examples: those of the question's subject in the data, else its file's."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **options: Any) -> Any:
        """The worked examples and the question."""
        examples: Any = self.dataset.get("dev", {}).get(doc["subject"]) or self.fewshot_cfg.samples
        self.sampler.replace_df(examples)
        return super().fewshot_context(doc, min(num_fewshot, len(examples)), *args, **options)


class ForethoughtLM(TemplateLM):
    """A ThinkingModel for the harness.

    - `loglikelihood`: samples thoughts after the context; the probability of the continuation is its mean over them.
      The choices of a question are scored after the same thoughts.
    - `loglikelihood_rolling`: thinks before every `think_every`-th token of the text.
    - `generate_until`: thinks once, then writes. Only the text after the thought is the answer.

    With `think_when`, it thinks only where the entropy of its plain prediction is above a bound (see ThinkingModel).
    The same seed gives the same results for any batch size.
    """

    def __init__(
        self,
        path: str | ThinkingModel,
        thoughts: int = 1,
        thinking: bool = True,
        *,
        think_every: int = 1,
        think_when: str | None = None,
        seed: int = 0,
        thought_temperature: float | None = None,
        **options: Any,
    ):
        """`path` is a loaded model, or what ThinkingModel.load takes. `thinking=False`: the same model, no thoughts.

        `thought_temperature` replaces method.temperature; 0 takes the most likely tokens. `options` are the harness's
        batch_size (thoughts decoded at once), device and max_gen_toks, and any option of Forethought by its full name,
        such as method.thought_length=64. Raises UserError.
        """
        super().__init__()
        if thoughts < 1 or think_every < 1:
            raise UserError(f"thoughts = {thoughts}, think_every = {think_every}: must be at least 1")
        thinking_rule(think_when, thoughts)  # refuses what it cannot be before the model is loaded
        self.max_gen_toks = int(options.pop("max_gen_toks", 256))
        self.thoughts, self.thought_temperature = thoughts if thinking else 0, thought_temperature
        self.think_every, self.think_when, self.seed = think_every, think_when, seed
        self.thinker = path if isinstance(path, ThinkingModel) else ThinkingModel.load(path, _overrides(options))
        self.tokenizer = self.thinker.tokenizer
        self._device = self.thinker.model.device
        self.progress: Callable[[int], Any] | None = None  # in place of bars: gets the number of requests just done

    @property
    def max_length(self) -> int:
        """The longest text, in tokens, that leaves positions for a thought."""
        return self.thinker.max_text_tokens(self.thoughts)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; where the tokenizer has none, the one that begins it."""
        return self._special("eos_token_id", "bos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the one that begins a text, where there is one."""
        return self._special("bos_token_id", "eos_token_id")

    def _special(self, *names: str) -> int:
        found = [token for name in names if (token := getattr(self.tokenizer, name)) is not None]
        if not found:
            path = self.thinker.config.model.path
            raise UserError(f"path = {path!r}: its tokenizer has no token that begins or ends a text")
        return found[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens, by default with the special ones that begin training documents, but never a second BOS."""
        begins = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        return context_tokens(self.tokenizer, string, special)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            self.thinker.check_length(1 + len(continuation), self.thoughts)
            pairs.append((context[len(continuation) - self.max_length :], continuation))  # the newest tokens that fit
        with self._bar("loglikelihood", len(pairs), disable_tqdm) as bar:
            progress = functools.partial(self._advance, bar)
            scores = self.thinker.score(pairs, seed=self.seed, progress=progress, **self._once())
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _once(self) -> dict[str, Any]:
        """How to think at the end of a context."""
        names = ("thoughts", "think_when", "thought_temperature")
        return {name: getattr(self, name) for name in names}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text from its first token on, in windows where it is longer than the model."""
        totals = []
        for (text,) in tqdm([one.args for one in requests], disable=disable_tqdm, desc="Running rolling requests"):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - self.think_every, 1)
            total = 0.0
            how: dict[str, Any] = {**self._once(), "think_every": self.think_every, "seed": self.seed}
            for context, continuation in map(make_disjoint_window, windows):
                total += self.thinker.log_likelihood([*context, *continuation], given=len(context), **how)
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A Reply to each context, up to the first of the strings that end it."""
        asked: list[Any] = [one.args for one in requests]
        seen: Counter[str] = Counter()
        rows, replies = [], []
        for context, options in asked:
            rows.append((context, options, seen[context]))  # with its turn among equal contexts
            seen[context] += 1
        order = Collator(rows, lambda row: -len(row[0]), group_by="gen_kwargs")
        with self._bar("generate_until", len(requests), disable_tqdm) as bar:
            for batch in order.get_batched(n=self.thinker.config.train.rows):
                sampling, until = self._sampling(batch[0][1])
                longest = self.max_length - sampling.limit
                contexts = [self.tok_encode(context)[-longest:] for context, _, _ in batch]
                seeds = [self.seed + _SEEDS * turn for _, _, turn in batch]
                answers = self.thinker.answer(contexts, sampling, seeds, until=until, **self._once())
                for (context, options, _), answer in zip(batch, answers, strict=True):
                    reply = Reply(answer.text)
                    reply.answer = answer
                    self.cache_hook.add_partial("generate_until", (context, options), reply)
                    replies.append(reply)
                self._advance(bar, len(batch))
        return order.get_original(replies)

    def _sampling(self, asked: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """How to draw an answer, and the strings that end it, by the harness's options."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        if odd := sorted(options.keys() - _KNOWN):
            raise UserError(f"generation options {', '.join(odd)}: must be among {', '.join(sorted(_KNOWN))}")
        limit = options["max_gen_toks"]
        if limit >= self.max_length:
            raise UserError(f"max_gen_toks = {limit}: must be below the {self.max_length} tokens that a text may have")
        temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
        sampling = Sampling(limit=limit, temperature=temperature, top_p=options.get("top_p", 1.0))
        return sampling, list(options.get("until", []))

    def _bar(self, name: str, total: int, disable: bool) -> tqdm:
        return tqdm(total=total, disable=disable or self.progress is not None, desc=f"Running {name} requests")

    def _advance(self, bar: tqdm, done: int) -> None:
        bar.update(done)
        if self.progress is not None:
            self.progress(done)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.thinker.config.model.path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """By the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


register_model("forethought")(ForethoughtLM)


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Nested options of Forethought from the harness's flat ones."""
    batch, device, _ = (options.pop(name, None) for name in ("batch_size", "device", "max_batch_size"))
    words = [] if batch in (None, "auto") else [f"--train.rollout_batch={batch}"]
    if device is not None:  # the harness requests a GPU where the user names no device
        kind = str(device).partition(":")[0]
        words.append(f"--model.device={'auto' if kind == 'cuda' else kind}")
    return read_overrides([*words, *(f"--{name}={value}" for name, value in options.items())])


def main(words: Sequence[str]) -> None:
    """The harness's own command line, by default with `--model forethought` and the task files of this package."""
    words = list(words)
    runs = not words or words[0].startswith("--") or words[0] == "run"
    options = {word.partition("=")[0] for word in words}
    if runs and len(words) > 1:
        words += [] if options & {"--model", "-M"} else ["--model", "forethought"]
        words += [] if "--include_path" in options else ["--include_path", str(TASKS)]
    sys.argv = ["forethought lm-eval", *words]
    cli_evaluate()
