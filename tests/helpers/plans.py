"""Small machines, shapes and jobs to plan."""

from typing import Any

from forethought.config import Config, from_dict
from forethought.flops import Attention, SavedBytes, Shape
from forethought.tools.plan.job import Job, Machine

CPU = Machine(name="cpu", memory=8e9, bf16=1e9, fp32=1e9, bandwidth=1e9, launch=0.0)


GPU = Machine(
    name="gpu", memory=100e9, bf16=100e12, fp32=10e12, bandwidth=1e12, inside=100e9, across=10e9,
    matmul_share=0.5, copy_share=0.5, link_share=0.5, read_share=0.5, update_share=0.5, decode_share=0.5,
    latency=0.0, launch=0.0, replay=0.0,
)  # fmt: skip


TINY = Shape(
    model_type="llama", hidden=8, vocab=10, parameters=1000, matmul_weights=600, layers=2, intermediate=16,
    attention=(Attention(heads=4, kv_heads=2, head_dim=2, window=None),) * 2, mamba=(),
    saved=SavedBytes(fp32=1000, bf16=500, fused=400),
)  # fmt: skip


def config(**sections: Any) -> Config:
    """Two positions of one document each, two thoughts of 4 tokens."""
    values: dict[str, Any] = {
        "corpus": {"window": 9, "min_tokens": 2},
        "method": {"group": 2, "thought_length": 4},
        "train": {"batch": 2, "rollout_batch": 4, "steps": 10},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return from_dict(values)


def job(options: Config | None = None, shape: Shape = TINY, **changes: Any) -> Job:
    """A job with an opening of one token."""
    values: dict[str, Any] = {"machine": GPU, "prefix": 8, "document": 8, "max_prefix": 8, "length": 4} | changes
    return Job(config=options or config(), shape=shape, **{**values, "length": float(values["length"])})
