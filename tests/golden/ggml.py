"""ggml's own quantiser, called through ctypes: the oracle for golden vectors and for benchmarks.

It needs ggml's source, or a shared library made from it. The source comes with llama.cpp, or as

    pip download --no-deps --no-binary :all: stable-diffusion-cpp-python==0.4.7
    tar xzf stable_diffusion_cpp_python-0.4.7.tar.gz
    GGML=stable_diffusion_cpp_python-0.4.7/vendor/stable-diffusion.cpp/ggml

of which two C files are compiled here, in seconds. Nothing of ggml is kept in this repository.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

# What ggml.c calls of ggml's C++ part on this path: a lock, needless with one thread. It calls more
# elsewhere, which stays unresolved: the library is bound lazily.
_STUBS = "void ggml_critical_section_start(void) {} void ggml_critical_section_end(void) {}"
_DEFINES = ["-DNDEBUG", "-D_GNU_SOURCE", '-DGGML_VERSION="0"', '-DGGML_COMMIT="0"']


def compile_library(source: Path, library: Path) -> None:
    """Compile ggml's quantisers as ggml's CMake does: -O3, and no -march, so no fused products."""
    stubs = library.with_suffix(".c")
    stubs.write_text(_STUBS)
    files = [str(source / "src" / name) for name in ("ggml.c", "ggml-quants.c")]
    include = [f"-I{source / name}" for name in ("include", "src")]
    flags = ["-O3", "-shared", "-fPIC", *_DEFINES, *include]
    command = [os.environ.get("CC", "cc"), *flags, *files, str(stubs), "-lm", "-o", str(library)]
    subprocess.run(command, check=True)


class Ggml:
    """`ggml_quantize_chunk` of a ggml source folder (that with `src/ggml-quants.c`) or library."""

    def __init__(self, path: Path):
        with tempfile.TemporaryDirectory() as folder:
            library = path
            if path.is_dir():
                library = Path(folder) / "ggml.so"
                compile_library(path, library)
            self._library = ctypes.CDLL(str(library.resolve()), mode=os.RTLD_LAZY)
        chunk, row_size = self._library.ggml_quantize_chunk, self._library.ggml_row_size
        chunk.restype = row_size.restype = ctypes.c_size_t
        pointer, int64 = ctypes.c_void_p, ctypes.c_int64
        chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
        row_size.argtypes = [ctypes.c_int, int64]

    def quantize(self, x: np.ndarray, qtype: int, importance: np.ndarray | None) -> np.ndarray:
        """(rows, cols) float32 -> (rows, bytes) uint8; importance: (cols,) float32."""
        out = np.empty((len(x), self._library.ggml_row_size(int(qtype), x.shape[1])), np.uint8)
        self.quantize_into(out, x, qtype, importance)
        return out

    def quantize_into(self, out, x, qtype, importance) -> None:
        """As `quantize`, into `out`; ctypes lets other threads run meanwhile."""
        weights = None if importance is None else importance.ctypes.data
        size = (0, len(x), x.shape[1])
        self._library.ggml_quantize_chunk(
            int(qtype), x.ctypes.data, out.ctypes.data, *size, weights
        )
