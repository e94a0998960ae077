"""What the speed benchmarks share: models with random weights, text, the machine's ceilings, alternating timing."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from forethought.config import Config, Method, Model, Train, Update
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat

transformers.logging.set_verbosity_error()

OPEN, CLOSE = (3, 4, 5), (6, 7, 8)  # of three tokens a side, so that a random model never closes by itself
FORM = ThoughtFormat(before=(), after=(), open=OPEN, close=CLOSE, bos=None, pad=0)


def qwen3(vocab: int, hidden: int, layers: int, **more: Any) -> Any:
    """A Qwen3-shaped configuration."""
    return transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=more.get("intermediate", 3 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=more.get("heads", hidden // 64),
        num_key_value_heads=more.get("kv_heads", hidden // 128),
        head_dim=more.get("head_dim", 64),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def nemotron(vocab: int, hidden: int) -> Any:
    """A NemotronH-shaped configuration: Mamba-2, MLP and one attention layer."""
    kinds = ["linear_attention", "mlp", "linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"]
    return transformers.NemotronHConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        layers_block_type=kinds,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        intermediate_size=3 * hidden,
        ssm_state_size=32,
        mamba_num_heads=hidden // 32,
        mamba_head_dim=64,
        n_groups=2,
        chunk_size=64,
        mamba_proj_bias=False,
        max_position_embeddings=8192,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3 4x256": lambda: qwen3(4096, 256, 4),
    "qwen3 8x512": lambda: qwen3(32_000, 512, 8),
    "nemotron_h 8x256": lambda: nemotron(4096, 256),
    "qwen3 1.7b": lambda: qwen3(151_936, 2048, 28, heads=16, kv_heads=8, head_dim=128, intermediate=6144),
}


def build(name: str, device: str, seed: int = 0) -> Any:
    """A causal LM with random fp32 weights, in evaluation mode."""
    config = MODELS[name]()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def stops(prefix: int, places: int) -> list[int]:
    """Evenly spaced places in a document, the last behind `prefix` tokens."""
    return [round(prefix * (k + 1) / places) for k in range(places)]


def window(prefix: int, places: int, vocab: int, seed: int = 0) -> Window:
    """A document of random tokens that are no delimiters, marked at its `stops`, with the last one's target."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, vocab, (prefix + 1,), generator=generator).tolist()
    return Window(document="0", start=0, tokens=tokens, marks={"stop": tuple(stops(prefix, places))})


def tokenizer(vocab: int) -> Any:
    """Token i is the word "i"."""
    words = Tokenizer(WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")


def settings(length: int, places: int, group: int, shared: bool = True, chunk: int = 0, batch: int = 0) -> Config:
    """RLP's options for one document's worth of thoughts."""
    return Config(
        model=Model(prefix="shared" if shared else "replicated"),
        method=Method(
            group=group,
            thought_length=length,
            positions=places,
            position_policy="marked",  # a random start would leave prefixes of half the length on average
            marked_share=1.0,
            temperature=1.0,
        ),
        train=Train(
            steps=10**6, log_every=10**6, batch=batch or places, rollout_batch=max(places * group, 16), log_thoughts=0
        ),
        update=Update(tokens_per_chunk=chunk),
    )


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def alternately(
    jobs: dict[str, Callable[[], None]], repeats: int, warmup: int = 1, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each job, the jobs taking turns within one run.

    The clock `cpu` counts what the process computes, so that others on the machine disturb it less; with more than one
    thread it counts waiting threads too.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + repeats):
        for name, job in jobs.items():
            gc.collect()
            synchronise()
            started = now()
            job()
            synchronise()
            if turn >= warmup:
                seconds[name].append(now() - started)
    return seconds


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as long the other takes, turn by turn: median, minimum and maximum."""
    values = [b / a for a, b in zip(mine, theirs, strict=True)]
    return {"ratio_median": statistics.median(values), "ratio_min": min(values), "ratio_max": max(values)}


def ceilings(device: str, clock: str = "wall") -> dict[str, float]:
    """The machine's own rates, now: a square fp32 matrix product in GFLOP/s and a copy in GB/s."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    big = torch.randn(2**24 if device == "cpu" else 2**28, device=device)
    other = torch.empty_like(big)
    seconds = alternately({"matmul": lambda: torch.mm(a, b), "copy": lambda: other.copy_(big)}, 7, clock=clock)
    return {
        "matmul_gflops": 2 * size**3 / min(seconds["matmul"]) / 1e9,
        "copy_gb_s": 2 * big.nbytes / min(seconds["copy"]) / 1e9,
    }
