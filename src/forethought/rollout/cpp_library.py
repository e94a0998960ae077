"""decoder.cpp as a library: compiled for this processor on first use, and what its functions take."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_WEIGHTS = ("norm", "qkv", "qkv_bias", "query_norm", "key_norm", "out", "out_bias", "second_norm", "gate_up", "down")


class Layer(ctypes.Structure):
    """`Layer` of decoder.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_WEIGHTS, "prefix_keys", "prefix_values", "keys", "values")]


class Call(ctypes.Structure):
    """`Call` of decoder.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "heads", "key_heads", "size", "inner", "vocabulary")),
        *((name, ctypes.c_int64) for name in ("layers", "threads", "spans", "column", "room", "length")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("norm", "head", "cosines", "sines", "span", "start", "states")),
        *((name, ctypes.c_void_p) for name in ("logits", "layer")),
    ]


@cache
def library() -> Any:
    """The functions, from the user's cache if they were compiled before. Raises ValueError where that fails."""
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), *_FLAGS]
    if shutil.which(compiler[0]) is None:
        raise ValueError("there is no C++ compiler (c++, or what CXX names)")
    source = Path(__file__).with_name("decoder.cpp")
    macros = _run([*compiler, "-dM", "-E", "-x", "c++", os.devnull])  # what the processor can do, among others
    name = hashlib.sha256(source.read_bytes() + " ".join([*compiler, macros]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "forethought"
    built = folder / f"compiled-{name}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                _run([*compiler, str(source), "-o", f"{made}/compiled.so"])
                Path(made, "compiled.so").replace(built)  # at once, whoever else builds it
        library = ctypes.CDLL(str(built))
    except OSError as error:
        raise ValueError(f"{built} cannot be made or used: {error}") from error
    library.panel_width.restype = ctypes.c_int64
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.large_pages.argtypes = [pointer, number]
    library.pack.argtypes = [pointer, number, number, number, number, number, pointer]
    library.draw.argtypes = [pointer, number, number, ctypes.c_double, pointer, number, pointer, pointer]
    library.pack_columns.argtypes = [pointer, number, number, number, pointer]
    return library


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{words[0]} fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout
