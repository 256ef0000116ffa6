"""llama.cpp's importance matrix as a GGUF file: how much each column of a weight counts.

For the weight NAME the file holds `NAME.in_sum2`, the sum over tokens of each input's square, and
`NAME.counts`, how many tokens that were, both float32, one row a matrix.
Source: llama.cpp tools/imatrix (`save_imatrix`), tools/quantize (`load_imatrix`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .architectures import prefix_of
from .errors import GGUFError
from .reader import GGUFFile
from .writer import write_gguf

_SUM, _COUNT = ".in_sum2", ".counts"
# Of the mean of all columns. An input that was 0 all the while, as of a text encoder that was left
# out, may not be so in the next picture; and a block whose weights count nothing is written as 0.
_LEAST = 1e-6


@dataclass(frozen=True)
class Seen:
    """What one weight's inputs were: `squares` (cols,) float64, each one's sum of squares over
    `tokens` tokens."""

    squares: Tensor
    tokens: int

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(self.squares + other.squares, self.tokens + other.tokens)


def write_importance(
    path: str | os.PathLike[str], seen: Mapping[str, Seen], runs: int, about: str
) -> None:
    """Write what was seen of each weight, by its name; `runs` samplings of `about`.

    Raises: GGUFError where it cannot be written; the old file then stays.
    """
    tensors = []
    for name, row in seen.items():
        tensors.append((name + _SUM, row.squares.float().view(1, -1)))
        tensors.append((name + _COUNT, torch.tensor([[row.tokens]], dtype=torch.float32)))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [about],
        "imatrix.chunk_count": runs,
        "imatrix.chunk_size": max((row.tokens // runs for row in seen.values()), default=0),
    }
    write_gguf(path, "imatrix", metadata, tensors)


def read_importance(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weight's name -> (cols,) float32, the mean square of each input; see `_LEAST`.

    Raises: GGUFError for a file of another kind, or values that are negative or not finite.
    """
    with GGUFFile(path) as file:
        names = [name.removesuffix(_SUM) for name in file.tensors if name.endswith(_SUM)]
        if not names:
            raise GGUFError(f"{file.path}: no importance file: it has no tensor …{_SUM}")
        means = {name: _mean(file, name) for name in names}
    prefix = prefix_of(names)
    return {name.removeprefix(prefix): mean for name, mean in means.items()}


def _mean(file: GGUFFile, name: str) -> Tensor:
    if name + _COUNT not in file.tensors:
        raise GGUFError(f"{file.path}: {name}{_SUM} has no {_COUNT} beside it: gather it anew")
    sums, counts = (file.tensor(name + end).float() for end in (_SUM, _COUNT))
    matrices = max(1, counts.numel())
    if sums.numel() % matrices:
        raise GGUFError(f"{file.path}: {name}{_SUM} and {_COUNT} do not fit: gather it anew")
    total = sums.view(matrices, -1).sum(0)
    if not (counts.isfinite() & (counts >= 0)).all():
        raise GGUFError(f"{file.path}: {name}{_COUNT} has bad values: gather it anew")
    mean = total / counts.sum() if counts.sum() > 0 else torch.ones_like(total)
    if not (mean.isfinite() & (mean >= 0)).all():
        raise GGUFError(f"{file.path}: {name}{_SUM} has bad values: gather it anew")
    least = float(mean.double().mean()) * _LEAST
    return mean.clamp(min=least) if least else torch.ones_like(mean)
