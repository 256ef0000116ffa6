"""What Triton makes of the kernels for a GPU, which need not be there."""

import torch
from gguf import GGML_QUANT_SIZES
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"data": "*u8", "levels": "*fp32"} | dict.fromkeys(
    ("x", "bias", "up", "down", "out"), "*{}"
)
TIMES_16 = {*POINTERS, "rows", "columns", "rank"}  # addresses, as torch gives them; a model's sizes


def dequantize(dequant, qtype, gpu=("cuda", 80, 32), dtype="bf16"):
    """Dequantising as triton_dequant.py, here `dequant`, starts it."""
    constants = _constants(dequant, qtype)
    constants["B"] = dequant.rows(constants["size"], constants["lanes"])
    return _build(dequant._dequantize, constants, gpu, dtype, num_warps=dequant._WARPS)


def product(linear, dequant, qtype, M, gpu=("cuda", 80, 32), dtype="bf16"):
    """The product of M vectors as triton_linear.py, here `linear`, starts it."""
    constants = _constants(dequant, qtype)
    at_once = dequant.beside(constants["lanes"], constants["size"])
    constants |= {"take": linear._add_product, "beside": at_once, "M": M, "N": linear._ROWS}
    return _build(linear._linear, constants, gpu, dtype, num_stages=1)


def merge(merged, dequant, qtype, R, gpu=("cuda", 80, 32), dtype="bf16"):
    """Dequantising with LoRAs of R ranks as triton_merged.py, here `merged`, starts it."""
    constants = _constants(dequant, qtype)
    at_once = dequant.beside(constants["lanes"], constants["size"])
    constants |= {"take": merged._store_sum, "beside": at_once, "N": merged._ROWS, "R": R}
    constants["turns"] = merged._COLUMNS // (constants["size"] * at_once)
    return _build(merged._merge, constants, gpu, dtype, num_stages=merged._STAGES)


def _constants(dequant, qtype):
    (size, width), (unpack, lanes) = GGML_QUANT_SIZES[qtype], dequant.FORMATS[qtype]
    constants = {"unpack": unpack, "width": width, "size": size, "lanes": lanes}
    untabled = dequant.levels(qtype, torch.device("cpu")) is None
    return constants | ({"levels": None} if untabled else {})


def _build(kernel, constants, gpu, dtype, **options):
    names = kernel.arg_names
    pointers = {name: kind.format(dtype) for name, kind in POINTERS.items() if name in names}
    signature = dict.fromkeys(names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    times_16 = [i for i, name in enumerate(names) if name in TIMES_16 - constants.keys()]
    known = {(i,): [["tt.divisibility", 16]] for i in times_16}
    source = ASTSource(kernel, signature, constants, known)
    return compile(source, target=GPUTarget(*gpu), options={"enable_fp_fusion": False} | options)
