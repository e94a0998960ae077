"""The FLOPs of RLP with the shape of Qwen3-1.7B. Nothing is run. Prints the tables of docs/flops.md.

The last lines are of rollout.py's samples: 16 thoughts of 64 tokens, and the closing delimiter of three.

python benchmarks/flops_budget.py
"""

import dataclasses
from typing import get_args

from harness import CLOSE, MODELS, OPEN
from transformers import LlamaConfig, Qwen3Config

from forethought.flops import (
    Flops,
    Shape,
    Sharing,
    Work,
    cpt_step,
    decode_flops,
    equal_flops_steps,
    forward_flops,
    rlp_step,
    t_flop,
)
from forethought.memory import cache_numbers

SHAPE = Shape.of(
    Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
)
GROUP, BATCH, STEPS, PREFIX = 16, 512, 350, 1024
T_INP = 170_000_000


def step(prefix: int, document: int, length: int, sharing: Sharing) -> Flops:
    """A step of 512 documents with one position each and 16 thoughts, all of `length` tokens, all closed."""
    one = Work(
        windows=(document,),
        owners=(0,),
        prefixes=(prefix,),
        opening=1,
        thoughts=((length,) * GROUP,),
        tails=((0,) * GROUP,),
        sharing=sharing,
    )
    cost = dataclasses.asdict(rlp_step(SHAPE, one))
    return Flops(**{phase: BATCH * flops for phase, flops in cost.items()})


def per_token() -> None:
    print(f"parameters {SHAPE.parameters:,}; weights that multiply every token {SHAPE.matmul_weights:,}")
    read = forward_flops(SHAPE, [(PREFIX, 0)], 0) / PREFIX
    print(f"FLOPs a token: reading {PREFIX} tokens {read:.4g}")
    print(f"FLOPs a token: decoding behind {PREFIX} tokens, head included {decode_flops(SHAPE, [(1, PREFIX)]):.4g}")
    print(f"FLOPs a token: next-token training on {PREFIX} tokens {cpt_step(SHAPE, [PREFIX]).total / PREFIX:.4g}")
    cache = 2 * PREFIX * cache_numbers(SHAPE)[0]
    print(f"bytes: training {20 * SHAPE.parameters:,}, cache of {PREFIX} tokens in bf16 {cache:,}")


def by_length() -> None:
    phases = [field.name for field in dataclasses.fields(Flops) if field.name != "reference"]
    print(f"\n| L | sharing | {' | '.join(phases)} | total | next to document |")
    print("| --- |" + " --- |" * (len(phases) + 3))
    for length in (64, 256, 1024, 2048):
        least = step(PREFIX, PREFIX + 1, length, "document").total
        for sharing in get_args(Sharing):
            cost = step(PREFIX, PREFIX + 1, length, sharing)
            figures = " | ".join(f"{getattr(cost, phase):.3g}" for phase in phases)
            print(f"| {length} | {sharing} | {figures} | {cost.total:.3g} | {cost.total / least:.2f} |")


def budget() -> None:
    tokens = t_flop(GROUP, 2048, BATCH, STEPS, T_INP)
    document = round(T_INP / (BATCH * STEPS))
    print(
        f"\nT_flop = {GROUP} x 2048 x {BATCH} x {STEPS} + {T_INP:,} = {tokens:,} tokens, {tokens / T_INP:.1f} x T_inp"
    )
    rows = (2048,) * BATCH
    cpt = cpt_step(SHAPE, rows).total
    print(f"next-token training on T_flop tokens, rows of 2048: {cpt * tokens / sum(rows):.4g} FLOPs")
    for sharing in get_args(Sharing):
        rlp = STEPS * step(document // 2, document, 2048, sharing).total
        steps = equal_flops_steps(SHAPE, rlp, rows)
        print(
            f"RLP, {STEPS} steps, documents of {document} tokens, positions in the middle, L = 2048, {sharing}: "
            f"{rlp:.4g} FLOPs = {steps:,} steps of {BATCH} x 2048 tokens = {steps * sum(rows):.4g} tokens"
        )


def samples() -> None:
    smollm2 = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    print()
    for name, config in {"SmolLM2-135M": smollm2, "qwen3 8x512": MODELS["qwen3 8x512"]()}.items():
        for prefix in (512, 1024):
            work = Work(
                windows=(prefix + 1,),
                owners=(0,),
                prefixes=(prefix,),
                opening=len(OPEN),
                thoughts=((64,) * GROUP,),
                tails=((len(CLOSE) + 1,) * GROUP,),
            )
            cost = rlp_step(Shape.of(config), work)
            print(
                f"{name}, P = {prefix}: {cost.prefill / 1e9:.0f} GFLOP for the document, "
                f"{(cost.decode + cost.score) / 1e9:.0f} for the thoughts"
            )


if __name__ == "__main__":
    per_token()
    by_length()
    budget()
    samples()
