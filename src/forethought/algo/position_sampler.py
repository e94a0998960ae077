"""Where a method thinks: the configured policy, and the proxy that one of them asks."""

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from forethought.config import Config, Model, UserError
from forethought.data.corpus import Window
from forethought.data.positions import Positions, at_positions, draw, make_generator
from forethought.flops import Shape, forward_flops
from forethought.models.compute_copy import Network
from forethought.models.loading import load_model, load_tokenizer
from forethought.models.logprobs import chunk_tokens, no_think_entropy
from forethought.run import distributed


class PositionSampler:
    """Draws the positions of each step. With the policy `entropy` it keeps a proxy, frozen: a network more in memory.

    That is the model that method.proxy names, else `reference`, a copy of the start, else a copy of the policy as it is
    now. It never changes and is found again where it was, so checkpoints do not hold it.
    """

    def __init__(self, network: Network, reference: Any, tokenizer: Any, config: Config):
        self.config, self.proxy, self.calling, kind = config, None, network.calling, network.compute.config
        if config.method.policy == "entropy":
            self.proxy = reference
            if config.method.proxy:
                self.proxy, self.calling = _named(tokenizer, config), contextlib.nullcontext
                kind = self.proxy.config
            elif reference is None:
                self.proxy = copy.deepcopy(network.weights).requires_grad_(False)
        self.shape = None if self.proxy is None else Shape.known(kind)

    def draw(self, windows: list[Window], step: int) -> Positions:
        """K positions in each window."""
        options = self.config.method
        generator = make_generator(self.config.seed, "positions", step)
        if self.proxy is None:
            return draw(windows, options, generator)
        everywhere = at_positions(windows, [self._choices(window) for window in windows], 1)
        mine = distributed.shard_indices([len(window.tokens) for window in windows])
        places, _ = everywhere.of_windows(mine)
        with self.calling(self.proxy) as proxy:
            entropy = no_think_entropy(proxy, places, chunk_tokens(proxy, self.config.update.tokens_per_chunk))
        found = dict(zip(mine, entropy.split([len(self._choices(windows[i])) for i in mine]), strict=True))
        known = {i: one for some in distributed.gather(found) for i, one in some.items()}
        return draw(windows, options, generator, [known[i] for i in range(len(windows))])

    def flops(self, windows: Sequence[Window]) -> int:
        """What the proxy takes for a step; 0 where none is asked, or its architecture is not known."""
        if self.shape is None:
            return 0
        sizes = [len(self._choices(window)) for window in windows]
        return forward_flops(self.shape, [(size, 0) for size in sizes], sum(sizes))

    def _choices(self, window: Window) -> range:
        return range(1, len(window.tokens) - self.config.method.horizon + 1)


def _named(tokenizer: Any, config: Config) -> Any:
    """The model that method.proxy names. Raises UserError for one of other tokens, or of too few positions."""
    path = config.method.proxy
    options: Model = dataclasses.replace(config.model, path=path, tokenizer="", init="pretrained")
    try:
        vocabulary = load_tokenizer(options).get_vocab()
        proxy = load_model(options, config.seed)
    except UserError as error:
        raise UserError(str(error).replace("model.path", "method.proxy")) from None
    if vocabulary != tokenizer.get_vocab():
        raise UserError(f"method.proxy = {path!r}: has another tokenizer than the model; choose one with the same")
    limit = getattr(proxy.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.corpus.window > limit:
        raise UserError(f"method.proxy = {path!r}: has positions for {limit}, fewer than corpus.window")
    return proxy.requires_grad_(False)
