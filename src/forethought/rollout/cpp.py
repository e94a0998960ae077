"""Decoding on a CPU by compiled functions (decoder.cpp), for decoders of Llama's kind in fp32.

What a model's modules do in hundreds of small operations a token is one call here. Weights are put into order once for
each batch of thoughts, keys and values of documents when they are read or put together; norms, rotary positions,
attention and gates are computed in place. The model is read and not changed. Families are named, and a probe compares.
"""

import contextlib
import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from forethought.config import Method
from forethought.prefix import Prefix, SuffixCache, backbone, read, vocabulary
from forethought.prefix.states import State
from forethought.rollout.cpp_library import Call, Layer, library
from forethought.rollout.decoder import draw

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_BY_LENGTH = ("dynamic", "longrope")  # rotary positions that depend on what else is read


class Compiled:
    """Reads documents, then a token a row. Raises ValueError without a compiler, or for a model of another kind."""

    def __init__(self, model: Any):
        self.model = model
        self.library = library()
        self.width = int(self.library.panel_width())
        _check(model)
        self._sizes: dict[str, Any] = {}
        self._weights: list[dict[str, Tensor]] = []
        self._documents: list[_Documents] = []
        self._known: tuple[Any, ...] = ()  # what `_laid_out` found last
        self._head = torch.empty(0)
        with torch.no_grad(), self.ordered():
            _probe(model, self)

    @contextlib.contextmanager
    def ordered(self) -> Iterator["Compiled"]:
        """Hold the model's weights in the order that products of few rows read them, as they are now."""
        layers = self.model.base_model.layers
        products = [*(_products(layer) for layer in layers), {"head": [self.model.lm_head.weight]}]
        assert not self._weights, "one batch of thoughts at a time"
        try:
            self._sizes = _sizes(self.model)
            *weights, head = self._panels(products)
            self._head = head["head"]
            self._weights = [{**own, **self._vectors(layer)} for own, layer in zip(weights, layers, strict=True)]
            yield self
        finally:
            self._weights, self._documents, self._known, self._head = [], [], (), torch.empty(0)

    def read(self, documents: Sequence[Sequence[int]], stops: Sequence[Sequence[int]]) -> Prefix:
        """As `prefix.read`."""
        base, ends = self.model.base_model, [some[-1] for some in stops]
        shape = (len(documents), self._sizes["key_heads"], max(ends), self._sizes["size"])
        made = [_Documents.empty(shape, self.width) for _ in base.layers]
        for number, (tokens, end) in enumerate(zip(documents, ends, strict=True)):
            hidden = base.embed_tokens(torch.tensor(tokens[:end]))
            table = _table({**own, **one.of(number)} for own, one in zip(self._weights, made, strict=True))
            self._call(self.library.read, hidden, torch.arange(end), table, room=max(ends), length=max(ends))
        self._documents, self._known = made, ()
        states = (State(keys=x.keys, values=x.values, conv={}, recurrent={}, kernels={}) for x in made)
        return Prefix.of(states, stops, self.model.device)

    def step(self, tokens: Int[Tensor, " row"], fork: SuffixCache) -> Float[Tensor, "row vocab"]:
        """The logits that follow one more token of each row, whose keys and values go into the fork."""
        fork.make_room(1)
        states = self.model.base_model.embed_tokens(tokens)
        logits = states.new_empty(len(tokens), self.model.lm_head.weight.shape[0])
        table, spans, start = self._laid_out(fork)
        self._call(
            self.library.step, states, fork.position_ids(1)[:, 0], table, spans=len(spans), span=_at(spans),
            start=_at(start), column=fork.length, room=fork.room, length=self._documents[0].keys.shape[2],
            logits=_at(logits),
        )  # fmt: skip
        fork.length += 1
        return logits

    def _laid_out(self, fork: SuffixCache) -> tuple[Any, Tensor, Tensor]:
        """Where everything of a fork lies: a table of its layers, its spans and its first columns."""
        rows, known = fork.rows, self._known
        if known and known[0] is fork.layout and known[1] is rows[0].keys:  # shifted, dropped, joined: new tensors
            return known[2], known[3], known[4]
        for row in rows:
            if not row.is_initialized:
                some = torch.empty(len(fork.places), self._sizes["key_heads"], 1, self._sizes["size"])
                row.lazy_initialization(some, some)
        if any(one.keys is not row.state.keys for one, row in zip(self._documents, rows, strict=False)):
            self._documents = []
        self._documents = self._documents or [self._ordered_documents(row.state) for row in rows]
        table = _table(
            {**weights, **one.panels(), "keys": row.keys, "values": row.values}
            for weights, one, row in zip(self._weights, self._documents, rows, strict=True)
        )
        spans = torch.tensor(fork.layout.spans)
        self._known = (fork.layout, rows[0].keys, table, spans, fork.start)
        return table, spans, fork.start

    def draw(
        self, logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], options: Method
    ) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
        """As `decoding.draw`."""
        if options.top_p < 1:
            return draw(logits, noise, options)
        logits, noise = logits.contiguous(), noise.contiguous()
        tokens, logp = torch.empty(len(noise), dtype=torch.long), torch.empty(len(noise))
        self.library.draw(
            _at(logits), *logits.shape, options.temperature, _at(noise), torch.get_num_threads(), _at(tokens), _at(logp)
        )
        return tokens, logp

    def _call(self, function: Any, states: Tensor, at: Int[Tensor, " row"], table: Any, **more: int) -> None:
        """One of the functions over rows that stand `at` these positions; `states` are overwritten."""
        assert self._weights and len(states) == len(at), "within `ordered`, a position for each row"
        base = self.model.base_model
        turned = base.rotary_emb(states[None], at[None])
        cosines, sines = (some.expand(1, len(at), -1).contiguous() for some in turned)
        function(ctypes.byref(Call(
            **self._sizes, **more, rows=len(at), threads=torch.get_num_threads(), norm=_at(base.norm.weight),
            head=_at(self._head), cosines=_at(cosines), sines=_at(sines), states=_at(states),
            layer=ctypes.addressof(table),
        )))  # fmt: skip

    def _vectors(self, layer: Any) -> dict[str, Tensor]:
        """What a layer has besides matrices."""
        attention = layer.self_attn
        found = {
            "norm": layer.input_layernorm.weight,
            "qkv_bias": self._bias([part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]),
            "query_norm": getattr(getattr(attention, "q_norm", None), "weight", None),
            "key_norm": getattr(getattr(attention, "k_norm", None), "weight", None),
            "out_bias": self._bias([attention.o_proj.bias]),
            "second_norm": layer.post_attention_layernorm.weight,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _ordered_documents(self, state: State) -> "_Documents":
        """Of documents that were not read here, or were put together."""
        assert state.keys is not None and state.values is not None
        made, threads = _Documents.empty(tuple(state.keys.shape), self.width), torch.get_num_threads()
        length, size = state.keys.shape[2:]
        made.keys, made.values = state.keys, state.values
        for document in range(len(state.keys)):
            for head in range(state.keys.shape[1]):
                key, value = (some[document, head].contiguous() for some in (state.keys, state.values))
                to = [_at(some[document, head]) for some in (made.key_panels, made.value_panels)]
                self.library.pack(_at(key), length, size, self.width, 0, threads, to[0])
                self.library.pack_columns(_at(value), size, length, threads, to[1])
        return made

    def _panels(self, products: Sequence[dict[str, list[Tensor]]]) -> list[dict[str, Tensor]]:
        """The matrices, (output, input), of each product in panels with as many outputs of each; one allocation."""
        named = [(number, name, some) for number, one in enumerate(products) for name, some in one.items()]
        shapes = [
            (-(-some[0].shape[0] * len(some) // self.width), some[0].shape[1], self.width) for _, _, some in named
        ]
        whole = torch.empty(sum(math.prod(shape) for shape in shapes))
        self.library.large_pages(_at(whole), 4 * whole.numel())
        made: list[dict[str, Tensor]] = [{} for _ in products]
        for (number, name, matrices), shape in zip(named, shapes, strict=True):
            panels, whole = whole[: math.prod(shape)].view(shape), whole[math.prod(shape) :]
            panels[-1] = 0  # the last may have columns that are none
            share, threads = self.width // len(matrices), torch.get_num_threads()
            for i, matrix in enumerate(matrices):
                given = matrix.detach().contiguous()
                self.library.pack(_at(given), *given.shape, share, i * share, threads, _at(panels))
            made[number][name] = panels
        return made

    def _bias(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        if parts[0] is None:
            return None
        whole = torch.cat([part.detach() for part in parts if part is not None])
        return nn.functional.pad(whole, (0, _whole(len(whole), self.width) - len(whole)))


def _sizes(model: Any) -> dict[str, Any]:
    """What is the same in every call."""
    base = model.base_model
    attention, size = base.layers[0].self_attn, base.layers[0].self_attn.head_dim
    return {
        "hidden": base.norm.weight.shape[0],
        "heads": attention.q_proj.out_features // size,
        "key_heads": attention.k_proj.out_features // size,
        "size": size,
        "inner": base.layers[0].mlp.up_proj.out_features,
        "vocabulary": model.lm_head.weight.shape[0],
        "layers": len(base.layers),
        "eps": base.norm.variance_epsilon,
        "scale": attention.scaling,
    }


def _products(layer: Any) -> dict[str, list[Tensor]]:
    """The matrices of a layer's products; those of one product have as many outputs, and stand side by side."""
    attention, network = layer.self_attn, layer.mlp
    return {
        "qkv": [torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])],
        "out": [attention.o_proj.weight],
        "gate_up": [network.gate_proj.weight, network.up_proj.weight],
        "down": [network.down_proj.weight],
    }


@dataclass(slots=True)
class _Documents:
    """A layer's keys and values of all documents: as they are, and in panels."""

    keys: Float[Tensor, "document head prefix size"]
    values: Float[Tensor, "document head prefix size"]
    key_panels: Float[Tensor, "document head keys"]
    value_panels: Float[Tensor, "document head values"]

    @classmethod
    def empty(cls, shape: tuple[int, ...], width: int) -> "_Documents":
        documents, heads, length, size = shape
        panels = (_whole(length, width) * size, _whole(size, width) * length)
        keys, values = (torch.zeros(shape) for _ in range(2))
        return cls(keys, values, *(torch.zeros(documents, heads, some) for some in panels))

    def panels(self) -> dict[str, Tensor]:
        """Of all documents."""
        return {"prefix_keys": self.key_panels, "prefix_values": self.value_panels}

    def of(self, document: int) -> dict[str, Tensor]:
        """One document's own."""
        panels = {name: some[document] for name, some in self.panels().items()}
        return {**panels, "keys": self.keys[document], "values": self.values[document]}


def _table(layers: Iterable[dict[str, Tensor]]) -> Any:
    """`Layer` of decoder.cpp for each layer; the tensors must live as long."""
    made = [Layer(**{name: _at(tensor) for name, tensor in tensors.items()}) for tensors in layers]
    return (Layer * len(made))(*made)


def _whole(number: int, of: int) -> int:
    """The next multiple."""
    return -(-number // of) * of


def _at(tensor: Tensor) -> int:
    """Where a tensor's first number lies; the others must follow without gaps."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _check(model: Any) -> None:
    """Raise ValueError unless the functions compute what a model does."""
    if (family := model.config.model_type) not in _FAMILIES:
        raise ValueError(f"{type(model).__name__} is of another kind ({family} is none of {', '.join(_FAMILIES)})")
    weight = model.get_input_embeddings().weight
    if (weight.device.type, weight.dtype) != ("cpu", torch.float32):
        raise ValueError("it takes fp32 weights on a CPU")
    base, linear = model.base_model, [one for one in model.modules() if isinstance(one, nn.Linear)]
    networks = [one for layer in base.layers for one in layer.mlp.children() if isinstance(one, nn.Linear)]
    size = base.layers[0].self_attn.head_dim
    hindrances = {
        "its linear layers are changed, as by adapters": any(
            type(one) is not nn.Linear or "forward" in vars(one) for one in linear
        ),
        "its head or its gated networks have biases": any(one.bias is not None for one in (model.lm_head, *networks)),
        "its attention looks through a window": any(
            type(one) is not DynamicLayer for one in DynamicCache(config=model.config).layers
        ),
        "its rotary positions depend on the length of what is read": base.rotary_emb.rope_type in _BY_LENGTH,
        f"its heads have {size} numbers, no multiple of 16": size % 16 != 0,
    }
    for what, found in hindrances.items():
        if found:
            raise ValueError(what)


def _probe(model: Any, compiled: Compiled) -> None:
    """Compare two rows that read two tokens behind a document with the same rows by the model's own code."""
    size = model.get_input_embeddings().num_embeddings
    document, tokens = [i % size for i in range(5, 14)], torch.tensor([[17 % size, 18 % size]] * 2)
    plain, ours = (
        SuffixCache(reads([document], [[4, 9]]), (0, 1), 2) for reads in (partial(read, model), compiled.read)
    )
    wanted = vocabulary(model, backbone(model, tokens, plain, plain.position_ids(2)))
    for column in range(2):
        found = compiled.step(tokens[:, column].contiguous(), ours)
        gap = float((found - wanted[:, column]).abs().max() / wanted[:, column].abs().max().clamp(min=1e-6))
        if not gap < 1e-4:
            raise ValueError(f"{type(model).__name__} is of another kind (its logits differ by {gap:.1e})")
