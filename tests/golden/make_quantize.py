"""Make quantize.npz: weights, importances, and the blocks that ggml's C makes of them.

    python -m tests.golden.make_quantize GGML          write the file
    python -m tests.golden.make_quantize GGML --check  compare quant.quantize with ggml on far more

GGML is ggml's source folder or a shared library of it: `ggml.py` says where to get one.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as T

import quant
from quant.codebook import NEED_IMPORTANCE, SEARCHES
from quant.iq1_quantize import FORMATS
from tests.golden.ggml import Ggml

FILE = Path(__file__).with_name("quantize.npz")
COLS = 512


def weights(rng: np.random.Generator, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (rows or fewer, COLS) float32): ordinary weights, and those that break arithmetic."""
    shape = (rows, COLS)
    gauss = rng.normal(size=shape)
    yield "gaussian", gauss * 0.02
    yield "laplace", rng.laplace(size=shape)
    yield "zeros", np.zeros((1, COLS))
    yield "constant", np.array([[1.0], [-3e-3]]) * np.ones(COLS)
    outliers = gauss * 0.02
    outliers[:, ::97] *= 1000
    yield "outliers", outliers
    yield "ties", rng.integers(-16, 17, size=shape) / 16
    yield "coarse ties", rng.integers(-3, 4, size=shape) / 2
    yield "signs", rng.choice([-1.0, 1.0], size=shape)
    yield "subnormal", gauss * 1e-40
    yield "near subnormal", gauss * 1e-38
    yield "tiny", gauss * 1e-16
    yield "subnormal scales", gauss * 1e-7
    yield "large", gauss * 1e5
    yield "squares overflow", gauss * 1e19
    yield "huge", gauss * 1e37
    yield "positive", np.abs(gauss)
    yield "negative", -np.abs(gauss) - 1
    yield "sparse", np.where(rng.random(shape) < 0.9, 0, gauss)
    yield "zeros of both signs", np.abs(gauss) * rng.choice([0.0, -0.0, 1.0], size=shape)
    alone = np.zeros(COLS)
    alone[37::64] = [1, -1, 1e-3, -1e-9, 1e-16, 1e-39, -1e38, 5]
    yield "one in a block", alone[None]
    yield "wide range", gauss * 10.0 ** rng.uniform(-12, 0, size=shape)
    bits = rng.integers(0, 2**32, size=shape, dtype=np.uint32).view(np.float32)
    yield "random bits", np.where(np.isfinite(bits), bits, 1)


def importances(rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray | None]]:
    """(name, (COLS,) float32 or None)"""
    yield "none", None
    yield "skewed", (rng.normal(size=COLS) ** 4).astype(np.float32)
    gaps = np.where(rng.random(COLS) < 0.3, 0, 10.0 ** rng.uniform(-6, 6, COLS))
    gaps[64:160] = 0
    yield "gaps", gaps.astype(np.float32)


def taken(x: np.ndarray, qtype: T) -> np.ndarray:
    """(rows,) bool: what ggml quantises to these types.

    Where errors overflow it aborts on types with a codebook, or reads past its weights (IQ1); in
    IQ3_S it writes what follows 32 zeros to the wrong place.
    """
    rows = np.ones(len(x), bool)
    if qtype in SEARCHES or qtype in FORMATS:
        rows &= np.abs(x).max(1) < 1e8
    if qtype == T.IQ3_S:
        rows &= ~(x.reshape(len(x), -1, 32) == 0).all(2).any(1) | ~x.any(1)
    return rows


def make(ggml: Ggml) -> None:
    rng = np.random.default_rng(20)
    kinds = {name: np.asarray(x[:1], np.float32) for name, x in weights(rng, 1)}
    x = np.concatenate(list(kinds.values()))
    stored = {"x": x, "kinds": np.array(list(kinds))}
    for name, importance in importances(rng):
        if importance is not None:
            stored[f"importance/{name}"] = importance
        for qtype in blocks():
            if importance is None and qtype in NEED_IMPORTANCE:
                continue
            rows = stored[f"{qtype.name}/rows"] = taken(x, qtype)
            stored[f"{qtype.name}/{name}"] = ggml.quantize(x[rows], qtype, importance)
            size = quant.QTYPES[qtype].block_size
            part = None if importance is None else importance[:size].copy()
            one_block = ggml.quantize(x[:1, :size].copy(), qtype, part)
            stored[f"{qtype.name}/{name}/one block"] = one_block
    np.savez_compressed(FILE, **stored)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(stored)} arrays")


def check(ggml: Ggml) -> None:
    for qtype in blocks():
        rng, different, total = np.random.default_rng(1), 0, 0
        for _, importance in importances(rng):
            if importance is None and qtype in NEED_IMPORTANCE:
                continue
            part = None if importance is None else torch.from_numpy(importance)
            for _, x in weights(rng, 64):
                x = np.ascontiguousarray(x, np.float32)
                x = x[taken(x, qtype)]
                want = ggml.quantize(x, qtype, importance)
                got = quant.quantize(torch.from_numpy(x), qtype, part).numpy()
                size = quant.QTYPES[qtype].type_size
                differs = (want != got).reshape(-1, size).any(1)
                different, total = different + differs.sum(), total + len(differs)
        print(f"{qtype.name}: {different} of {total} blocks differ")


def blocks() -> list:
    return [qtype for qtype in quant.writable_types() if qtype in quant.QTYPES]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ggml", type=Path, help="ggml's source folder, or a shared library of it")
    parser.add_argument("--check", action="store_true", help="compare on far more, write nothing")
    options = parser.parse_args()
    (check if options.check else make)(Ggml(options.ggml))
