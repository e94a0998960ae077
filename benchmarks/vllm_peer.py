"""vLLM's side of `rollout.py`: the same weights and the same token lists, in the same process."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

from harness import OPEN, stops, window

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that its CPU seconds are counted
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

_ENGINES: list[Any] = []  # kept alive: they share process groups, which the first one destroyed would take from all


def job(model: Any, grid: tuple[int, ...], dtype: str = "float32") -> Callable[[], None]:
    """G thoughts of L tokens after each prefix, by `LLM.generate(n=G)` with prefix caching, as a job.

    Each call begins with an empty prefix cache, as each step of RLP has new text and new weights; the G samples of a
    prefix share it. vLLM is not asked for log-probabilities or seeds, which would cost it time.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    prefix, length, positions, group = grid
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = LLM(
            model=folder,
            runner="generate",
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=dtype,
            enable_prefix_caching=True,
            max_model_len=prefix + len(OPEN) + length + 1,
            max_num_seqs=max(positions * group, 16),
            kv_cache_memory_bytes=2**29,
        )
    _ENGINES.append(engine)
    tokens = window(prefix, positions, model.config.vocab_size).tokens
    prompts = [TokensPrompt(prompt_token_ids=[*tokens[:t], *OPEN]) for t in stops(prefix, positions)]
    sampling = SamplingParams(n=group, temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)

    def run() -> None:
        assert engine.reset_prefix_cache()
        found = engine.generate(prompts, sampling, use_tqdm=False)
        rows = [out.token_ids for one in found for out in one.outputs]
        assert len(rows) == positions * group and {len(row) for row in rows} == {length}

    return run
