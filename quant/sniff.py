"""What a file that is not GGUF seems to be, told from its first bytes, with the remedy."""

_NO_PICKLE = "no pickle is ever loaded; get a GGUF or safetensors file"
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK", f"a zip or torch checkpoint (.ckpt, .pt): {_NO_PICKLE}"),
    (b"\x80", f"a Python pickle (.ckpt, .pt, .bin): {_NO_PICKLE}"),
    (b"version https://git-lfs", "a git-lfs pointer: fetch the file itself with `git lfs pull`"),
    (b"<", "a web page: the download gave an error or login page; download again"),
    (b"{", "JSON text: the download gave an error message; download again"),
    (b"FUGG", "byte-swapped (big-endian) GGUF: convert it to little-endian"),
    (b"tjgg", "GGJT, which came before GGUF: get a GGUF file"),
    (b"lmgg", "GGML, which came before GGUF: get a GGUF file"),
    (b"fmgg", "GGMF, which came before GGUF: get a GGUF file"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\0\0\0\0", "zeros: the download has not finished; download again"),
)


def describe(head: bytes, instead: str = "a GGUF file") -> str:
    """One clause for an error message. `head`: at least the first 16 bytes, if there are any.
    `instead`: what to get where no more can be told.

    A safetensors file begins with the length of its JSON header as uint64, so byte 8 is "{".
    """
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors: load it with a loader for safetensors"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    for signature, meaning in _SIGNATURES:
        if start.startswith(signature):
            return meaning
    return f"unknown (it begins with {head[:4]!r}): get {instead}"
