"""The C++ backend (decoder.cpp): decoding of Llama-style models in fp32 on a CPU, one call per token.

Weights are packed into panels once for each batch of thoughts, keys and values of documents when they are read or
joined; norms, rotary embeddings, attention and gates are computed in place. With `bf16` the matrices of weights are
rounded to bf16, so that half as much is read from memory; sums are fp32. A processor with AVX512-BF16 also multiplies
in bf16: then the inputs of these products are rounded too, and so is attention over documents. The model is read and
never changed. The supported families are listed, and a probe compares the backend (with panels in fp32) with the model.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from forethought.config import Method
from forethought.models import lora
from forethought.prefix import LayerState, Prefix, SuffixCache, backbone, check_logits, lm_head, read
from forethought.rollout.decoder import sample_with_logp

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that depend on the length of the input
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_WEIGHTS = ("norm", "qkv_bias", "query_norm", "key_norm", "out_bias", "second_norm", "qkv", "out", "gate_up", "down")


class _Layer(ctypes.Structure):
    """`Layer` of decoder.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_WEIGHTS, "prefix_keys", "prefix_values", "keys", "values")]


class _Call(ctypes.Structure):
    """`Call` of decoder.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "heads", "key_heads", "size", "inner", "vocabulary")),
        *((name, ctypes.c_int64) for name in ("layers", "threads", "spans", "column", "capacity", "length", "bf16")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("head", "norm", "cosines", "sines", "span", "start", "states")),
        *((name, ctypes.c_void_p) for name in ("logits", "layer")),
    ]


@cache
def library() -> Any:
    """decoder.cpp, compiled for this processor or loaded from the user's cache. Raises ValueError if that fails."""
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), *_FLAGS]
    if shutil.which(compiler[0]) is None:
        raise ValueError("no C++ compiler found (c++, or the value of CXX)")
    source = Path(__file__).with_name("decoder.cpp")
    macros = _run([*compiler, "-dM", "-E", "-x", "c++", os.devnull])  # the processor's features, among others
    name = hashlib.sha256(source.read_bytes() + " ".join([*compiler, macros]).encode()).hexdigest()[:16]
    built = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "forethought", f"decoder-{name}.so")
    try:
        built = built.expanduser()
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as temporary:
                _run([*compiler, str(source), "-o", f"{temporary}/decoder.so"])
                Path(temporary, "decoder.so").replace(built)  # atomic, as other processes may build it too
        library = ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        what = f"{built} cannot be built or loaded: {error}"
        raise ValueError(f"{what}; set XDG_CACHE_HOME to a folder that can be written") from error
    library.panel_width.restype = library.pair.restype = ctypes.c_int64
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.large_pages.argtypes = [pointer, number]
    for function in (library.pack, library.pack_bf16):
        function.argtypes = [pointer, number, number, number, number, number, pointer]
    library.draw.argtypes = [pointer, number, number, ctypes.c_double, pointer, number, pointer, pointer]
    library.pack_documents.argtypes = [pointer, pointer, number, number, number, number, number, pointer, pointer]
    library.multiply.argtypes = [pointer, number, pointer, number, number, number, number, pointer]
    return library


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{words[0]} fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


class CppBackend:
    """A `decoder.Backend`. Raises ValueError without a compiler, or for a model that it does not support.

    `bf16` is always on for a model in bf16; what is not a matrix is then computed in fp32.
    """

    def __init__(self, model: Any, bf16: bool = False):
        _check(model)
        self.model, self.bf16 = model, False
        self.library = library()
        self.width = int(self.library.panel_width())
        self._sizes: dict[str, Any] = {}
        self._weights: list[dict[str, Tensor]] = []
        self._documents: list[dict[str, Tensor]] = []
        self._known: tuple[Any, ...] = ()  # the last result of `_tables`
        self._head = self._norm = torch.empty(0)
        with torch.no_grad(), self.prepared():
            _probe(model, self)  # in fp32
        self.bf16 = bf16 or model.dtype == torch.bfloat16

    @contextlib.contextmanager
    def prepared(self) -> Iterator["CppBackend"]:
        """Pack the model's current weights into panels."""
        layers = self.model.base_model.layers
        products = [*(_products(layer) for layer in layers), {"head": [[self.model.lm_head]]}]
        assert not self._weights, "one batch of thoughts at a time"
        try:
            self._sizes = {**_sizes(self.model), "bf16": int(self.bf16)}
            *weights, head = self._panels(products)
            self._head, self._norm = head["head"], self.model.base_model.norm.weight.float()
            self._weights = [{**own, **self._vectors(layer)} for own, layer in zip(weights, layers, strict=True)]
            yield self
        finally:
            self._weights, self._documents, self._known = [], [], ()
            self._head = self._norm = torch.empty(0)

    def read(self, documents: Sequence[Sequence[int]], prefix_lengths: Sequence[Sequence[int]]) -> Prefix:
        """Read documents, as `prefix.read`."""
        base, ends = self.model.base_model, [lengths[-1] for lengths in prefix_lengths]
        shape = (len(documents), self._sizes["key_heads"], max(ends), self._sizes["size"])
        layers = [self._empty_documents(shape) for _ in base.layers]
        for number, (tokens, end) in enumerate(zip(documents, ends, strict=True)):
            hidden = base.embed_tokens(torch.tensor(tokens[:end])).float()
            document = ({name: tensor[number] for name, tensor in layer.items()} for layer in layers)
            table = _table({**own, **one} for own, one in zip(self._weights, document, strict=True))
            self._call(self.library.read, hidden, torch.arange(end), table, capacity=max(ends), length=max(ends))
        self._documents, self._known = layers, ()
        states = (LayerState(keys=layer["keys"], values=layer["values"]) for layer in layers)
        return Prefix.of(states, prefix_lengths, self.model.device)

    def step(self, tokens: Int[Tensor, "row width"], cache: SuffixCache) -> Float[Tensor, "row vocab"]:
        """Read some tokens per row, column by column; the logits that follow the last."""
        return [self._step(column, cache) for column in tokens.T.contiguous()][-1]

    def _step(self, tokens: Int[Tensor, " row"], cache: SuffixCache) -> Float[Tensor, "row vocab"]:
        cache.reserve(1)
        states = self.model.base_model.embed_tokens(tokens).float()
        logits = states.new_empty(len(tokens), self.model.lm_head.weight.shape[0])
        table, spans, start = self._tables(cache)
        self._call(
            self.library.step, states, cache.position_ids(1)[:, 0], table, spans=len(spans), span=_pointer(spans),
            start=_pointer(start), column=cache.length, capacity=cache.capacity,
            length=self._documents[0]["keys"].shape[2], logits=_pointer(logits),
        )  # fmt: skip
        cache.length += 1
        return logits

    def _tables(self, cache: SuffixCache) -> tuple[Any, Tensor, Tensor]:
        """A cache's layers as C structures, its spans and the first column of each row."""
        rows, known = cache.rows, self._known
        if known and known[0] is cache.layout and known[1] is rows[0].keys:  # other tensors after shift, select or join
            return known[2], known[3], known[4]
        for row in rows:
            if not row.is_initialized:
                like = torch.empty(len(cache.positions), self._sizes["key_heads"], 1, self._sizes["size"])
                row.lazy_initialization(like, like)
        if any(one["keys"] is not row.state.keys for one, row in zip(self._documents, rows, strict=False)):
            self._documents = []
        self._documents = self._documents or [self._pack_documents(row.state) for row in rows]
        table = _table(
            {**weights, **one, "keys": row.keys, "values": row.values}
            for weights, one, row in zip(self._weights, self._documents, rows, strict=True)
        )
        spans = torch.tensor(cache.layout.spans)
        self._known = (cache.layout, rows[0].keys, table, spans, cache.start)
        return table, spans, cache.start

    def draw(
        self, logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], options: Method
    ) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
        """As `decoder.sample_with_logp`."""
        if options.top_p < 1:
            return sample_with_logp(logits, noise, options)
        logits, noise = logits.contiguous(), noise.contiguous()
        tokens, logp = torch.empty(len(noise), dtype=torch.long), torch.empty(len(noise))
        self.library.draw(
            _pointer(logits), *logits.shape, options.temperature, _pointer(noise), torch.get_num_threads(),
            _pointer(tokens), _pointer(logp),
        )  # fmt: skip
        return tokens, logp

    def _call(self, function: Any, states: Tensor, at: Int[Tensor, " row"], table: Any, **more: int) -> None:
        """Call a function for rows with these position ids; `states` are overwritten."""
        assert self._weights and len(states) == len(at), "inside `prepared`, a position id per row"
        base = self.model.base_model
        rotary = base.rotary_emb(states[None], at[None])
        cosines, sines = (some.expand(1, len(at), -1).contiguous() for some in rotary)
        function(ctypes.byref(_Call(
            **self._sizes, **more, rows=len(at), threads=torch.get_num_threads(), norm=_pointer(self._norm),
            head=_pointer(self._head), cosines=_pointer(cosines), sines=_pointer(sines), states=_pointer(states),
            layer=ctypes.addressof(table),
        )))  # fmt: skip

    def _vectors(self, layer: Any) -> dict[str, Tensor]:
        """The weights of a layer that are not matrices."""
        attention = layer.self_attn
        found = {
            "norm": layer.input_layernorm.weight,
            "qkv_bias": self._bias([part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]),
            "query_norm": getattr(getattr(attention, "q_norm", None), "weight", None),
            "key_norm": getattr(getattr(attention, "k_norm", None), "weight", None),
            "out_bias": self._bias([attention.o_proj.bias]),
            "second_norm": layer.post_attention_layernorm.weight,
        }
        return {name: tensor.float() for name, tensor in found.items() if tensor is not None}

    def _bias(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        if parts[0] is None:
            return None
        whole = torch.cat([part.detach() for part in parts if part is not None])
        return nn.functional.pad(whole, (0, -len(whole) % self.width))

    def _pack_documents(self, state: LayerState) -> dict[str, Tensor]:
        """Pack documents that were read by something else, or joined."""
        assert state.keys is not None and state.values is not None
        keys, values = state.keys.contiguous(), state.values.contiguous()
        packed = self._empty_documents(keys.shape)
        self.library.pack_documents(
            _pointer(keys), _pointer(values), len(keys) * keys.shape[1], *keys.shape[2:], self.bf16,
            torch.get_num_threads(), _pointer(packed["prefix_keys"]), _pointer(packed["prefix_values"]),
        )  # fmt: skip
        return {**packed, "keys": state.keys, "values": state.values}

    def _empty_documents(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """A layer's keys and values (document, head, prefix, size): as they are, and in panels (document, head, ..)."""
        documents, heads, length, size = shape
        key_panels = (length + -length % self.width) * size
        value_panels = (size + -size % self.width) * (length + length % 2)
        dtype = torch.bfloat16 if self.bf16 and self.library.pair() == 2 else torch.float32
        return {
            "keys": torch.zeros(shape),
            "values": torch.zeros(shape),
            "prefix_keys": torch.zeros(documents, heads, key_panels, dtype=dtype),
            "prefix_values": torch.zeros(documents, heads, value_panels, dtype=dtype),
        }

    def _panels(self, products: Sequence[dict[str, list[list[Any]]]]) -> list[dict[str, Tensor]]:
        """The (output, input) matrices of each product in panels that hold equally many outputs of each matrix."""
        named = [(number, name, some) for number, one in enumerate(products) for name, some in one.items()]
        pair, shapes = self.library.pair() if self.bf16 else 1, []
        for _, _, some in named:
            outputs, inputs = sum(one.out_features for layers in some for one in layers), some[0][0].in_features
            shapes.append((-(-outputs // self.width), inputs + inputs % pair, self.width))
        dtype, pack = (torch.bfloat16, self.library.pack_bf16) if self.bf16 else (torch.float32, self.library.pack)
        whole = torch.empty(sum(math.prod(shape) for shape in shapes), dtype=dtype)  # one allocation
        self.library.large_pages(_pointer(whole), whole.nbytes)
        packed: list[dict[str, Tensor]] = [{} for _ in products]
        for (number, name, matrices), shape in zip(named, shapes, strict=True):
            panels, whole = whole[: math.prod(shape)].view(shape), whole[math.prod(shape) :]
            panels[-1] = 0  # the last one may have columns of padding
            share, threads = self.width // len(matrices), torch.get_num_threads()
            for i, layers in enumerate(matrices):
                given = torch.cat([lora.full_weight(layer) for layer in layers]).to(dtype)
                pack(_pointer(given), *given.shape, share, i * share, threads, _pointer(panels))
            packed[number][name] = panels
        return packed


def _sizes(model: Any) -> dict[str, Any]:
    """Fields of `_Call` that are the same in every call."""
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


def _products(layer: Any) -> dict[str, list[list[Any]]]:
    """The linear layers of a layer's products.

    A product interleaves matrices of equally many outputs; the weights of some linear layers, one below the other, are
    one matrix.
    """
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "qkv": [[attention.q_proj, attention.k_proj, attention.v_proj]],
        "out": [[attention.o_proj]],
        "gate_up": [[mlp.gate_proj], [mlp.up_proj]],
        "down": [[mlp.down_proj]],
    }


def _table(layers: Iterable[dict[str, Tensor]]) -> Any:
    """An array of `_Layer`; the tensors must outlive it."""
    structures = [_Layer(**{name: _pointer(tensor) for name, tensor in tensors.items()}) for tensors in layers]
    return (_Layer * len(structures))(*structures)


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _check(model: Any) -> None:
    """Raise ValueError for a model that decoder.cpp does not implement."""
    if (family := model.config.model_type) not in _FAMILIES:
        raise ValueError(f"{type(model).__name__} is not supported ({family} is none of {', '.join(_FAMILIES)})")
    weight = model.get_input_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError("it takes fp32 or bf16 weights on a CPU")
    base, size = model.base_model, model.base_model.layers[0].self_attn.head_dim
    own = [one for layer in base.layers for groups in _products(layer).values() for group in groups for one in group]
    mlps = [one for layer in base.layers for one in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)]
    reasons = {
        "its linear layers are modified, or have other adapters than LoRA on fp32 weights": any(
            not lora.has_full_weight(one) for one in (*own, model.lm_head)
        ),
        "its head or its MLPs have biases": any(one.bias is not None for one in (model.lm_head, *mlps)),
        "its attention has a sliding window": any(
            type(one) is not DynamicLayer for one in DynamicCache(config=model.config).layers
        ),
        "its rotary embeddings depend on the length of the input": base.rotary_emb.rope_type in _BY_LENGTH,
        f"its head size is {size}, not a multiple of 16": size % 16 != 0,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(reason)


def _probe(model: Any, backend: CppBackend) -> None:
    """Compare two rows that read two tokens after a document with the same rows by the model itself."""
    size = model.get_input_embeddings().num_embeddings
    document, tokens = [i % size for i in range(5, 14)], torch.tensor([[17 % size, 18 % size]] * 2)
    eager, ours = (
        SuffixCache(reads([document], [[4, 9]]), (0, 1), 2) for reads in (partial(read, model), backend.read)
    )
    wanted = lm_head(model, backbone(model, tokens, eager, eager.position_ids(2)))
    for column in range(2):
        check_logits(model, backend.step(tokens[:, column : column + 1], ours), wanted[:, column], "in C++")
