"""Counting instructions in machine code, of which none is there to be run."""

import pytest

pytest.importorskip("triton")
sass = pytest.importorskip("fewstep.bench.sass")

CODE = """Function:_dequantize
--:-:-:-:8\tUIADD3 UR4, UR4, 0x1, URZ;
--:-:-:-:8\t@!P0 LDG.E.U8 R4, desc[UR4][R2.64];
04:-:-:-:8\tLOP3.LUT R5, R4, 0xf, RZ, 0xc0, !PT;
--:-:-:-:8\tI2F.U8 R6, R5;
--:-:-:-:8\tI2FP.F32.U32 R6, R5;
--:-:-:-:8\tFMUL R7, R6, R5;
--:-:-:-:8\t@P1 EXIT;
--:-:-:-:8\tSTG.E.128 desc[UR4][R2.64], R8;
--:-:-:-:8\tEXIT;
--:-:-:-:8\tBRA 0x1760;
"""


def test_instructions_are_counted_by_unit_to_the_last_exit():
    counted = sass.count(CODE, lines=8, tabled=False)
    assert (counted["issue"], counted["integer"], counted["convert"], counted["float"]) == (
        9,
        2,
        1,
        1,
    )
    assert counted["memory"] == 2 + 4  # eight lines, four a clock; 512 bytes, 128 a clock


def test_a_bound_is_a_share_of_the_bytes_time():
    gpu = sass.Gpu(90, multiprocessors=100, gigahertz=1, terabytes=1, products=1024)
    bounds = sass.bound(sass.count(CODE, 8, False), weights=32, octets=2.5, gpu=gpu, ranks=64)
    assert bounds["tensor"] == pytest.approx(bounds["memory"] * 2 / 6)
    assert bounds["memory"] == pytest.approx(6 / 1e11 / (32 * 2.5 / 0.9e12))
    assert max(bounds, key=bounds.get) == "memory"
