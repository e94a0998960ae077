"""What torch's FLOP counter saw."""

from torch.utils.flop_counter import FlopCounterMode


def counts(counter: FlopCounterMode) -> dict[str, int]:
    return {
        str(name).removeprefix("aten."): count for name, count in counter.get_flop_counts().get("Global", {}).items()
    }


def counted(counter: FlopCounterMode) -> int:
    """All that was counted, but for the backward pass of convolutions: that as twice the forward pass."""
    seen = counts(counter)
    wrong = seen.pop("convolution_backward", None)
    return sum(seen.values()) + (0 if wrong is None else 2 * seen["convolution"])
