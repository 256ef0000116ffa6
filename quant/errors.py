"""The one error that `quant` raises for bad input."""

ANEW = "it again, or another GGUF or safetensors file"
DAMAGED = "the file is incomplete or damaged: download it again"


class GGUFError(ValueError):
    """A GGUF file, block type or tensor that cannot be used.

    The message is one line: the file, the tensor or field, what was found, and what to do about it.
    """
