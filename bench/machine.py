"""What a result was measured on, without naming the machine."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "numba", "llvmlite", "numpy", "gguf")


def processor() -> str:
    """The processor's name and numbers, and which of the wide vector instructions it has."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(numbers + wide)})"


def machine() -> dict[str, str]:
    """Processor, Python, and the versions of the packages that count."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return {"processor": processor(), "python": platform.python_version(), **versions}
