"""Where a step thinks: the configured position policy, the proxy of the policy `entropy`, and each rank's share."""

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from forethought.algo.metrics import PositionShard
from forethought.config import Config, Method, Model, UserError, registry
from forethought.data.corpus import Window
from forethought.data.positions import Positions, ThoughtFormat, at_positions, draw_positions, make_generator
from forethought.flops import Shape, forward_flops
from forethought.models.compute_copy import Network
from forethought.models.loading import load_model, load_tokenizer, require_context
from forethought.models.logprobs import chunk_tokens, no_think_entropy
from forethought.run import distributed


class PositionSampler:
    """Draws the positions of each step. The policy `entropy` queries a proxy.

    It is the model that method.proxy names; where that is empty `reference`, a copy of the start, or a copy of the
    policy as it is now. Such a proxy is one more network in memory. It never changes and is rebuilt from where it came,
    so checkpoints do not hold it. With method.proxy `policy` the current policy is its own proxy.
    """

    def __init__(self, network: Network, reference: Any, form: ThoughtFormat, tokenizer: Any, config: Config):
        self.form, self.config = form, config
        self.proxy, self.as_model, architecture = None, network.as_model, network.model.config
        if registry.entry("position_policy", config.method.policy).proxy:
            self.proxy = reference
            if config.method.proxy == "policy":
                self.proxy, self.as_model = network.model, contextlib.nullcontext
            elif config.method.proxy:
                self.proxy, self.as_model = _load_proxy(tokenizer, config), contextlib.nullcontext
                architecture = self.proxy.config
            elif reference is None:
                self.proxy = copy.deepcopy(network.weights).requires_grad_(False)
        self.shape = None if self.proxy is None else Shape.known(architecture)
        if self.shape is not None and network.has_adapters and config.method.proxy in ("", "policy"):
            self.shape = self.shape.with_adapter(network.num_trainable)

    def shard(self, windows: list[Window], step: int) -> PositionShard:
        """This rank's share of the step's positions."""
        positions = self.draw(windows, step)
        mine, global_indices = shard_positions(positions, self.form, self.config.method)
        flops = self.flops(mine.windows)
        return PositionShard(
            positions=mine, global_indices=global_indices, global_count=len(positions), proxy_flops=flops
        )

    def draw(self, windows: list[Window], step: int) -> Positions:
        """K positions in each window, the same on every rank."""
        options = self.config.method
        generator = make_generator(self.config.seed, "positions", step)
        if self.proxy is None:
            return draw_positions(windows, options, generator)
        choices = at_positions(windows, [self._choices(window) for window in windows], 1)
        mine = distributed.shard_indices([len(window.tokens) for window in windows])
        positions, _ = choices.select_windows(mine)
        with self.as_model(self.proxy) as proxy:
            entropy = no_think_entropy(proxy, positions, chunk_tokens(proxy, self.config.update.tokens_per_chunk))
        found = dict(zip(mine, entropy.split([len(self._choices(windows[i])) for i in mine]), strict=True))
        entropies = {i: one for gathered in distributed.all_gather(found) for i, one in gathered.items()}
        return draw_positions(windows, options, generator, [entropies[i] for i in range(len(windows))])

    def flops(self, windows: Sequence[Window]) -> int:
        """FLOPs of the proxy on these windows; 0 without a proxy, or where its architecture is unknown."""
        if self.shape is None:
            return 0
        sizes = [len(self._choices(window)) for window in windows]
        return forward_flops(self.shape, [(size, 0) for size in sizes], sum(sizes))

    def _choices(self, window: Window) -> range:
        return range(1, len(window.tokens) - self.config.method.horizon + 1)


def shard_positions(positions: Positions, form: ThoughtFormat, options: Method) -> tuple[Positions, list[int]]:
    """The positions of this rank, whole documents, and their indices among all positions.

    Documents are balanced by the most tokens they may take: their own up to the last position, and all their thoughts.
    """
    thoughts = options.group * (form.overhead + options.thought_length)
    weights = [0] * len(positions.windows)
    for window in positions.window.tolist():
        weights[window] += thoughts
    documents, _ = form.documents_and_prefix_lengths(positions)
    for window, document in zip(dict.fromkeys(positions.window.tolist()), documents, strict=True):
        weights[window] += len(document)
    return positions.select_windows(distributed.shard_indices(weights))


def _load_proxy(tokenizer: Any, config: Config) -> Any:
    """The model of method.proxy. Raises UserError for another tokenizer or a context window that is too short."""
    path = config.method.proxy
    options: Model = dataclasses.replace(config.model, path=path, tokenizer="", init="pretrained")
    try:
        vocabulary = load_tokenizer(options).get_vocab()
        proxy = load_model(options, config.seed)
    except UserError as error:
        raise UserError(str(error).replace("model.path", "method.proxy")) from None
    if vocabulary != tokenizer.get_vocab():
        raise UserError(f"method.proxy = {path!r}: has another tokenizer than the model; choose one with the same")
    window = config.corpus.window
    require_context(proxy.config, window, f"method.proxy = {path!r}: corpus.window = {window}", "shorten the window")
    return proxy.requires_grad_(False)
