"""AMX's registers belong to a thread, so kernels give them back; for products see test_linear."""

import pytest

numba = pytest.importorskip("numba")
amx = pytest.importorskip("fewstep.quant.numba_amx")

if not pytest.importorskip("fewstep.quant.numba_jit").AMX:
    pytest.skip("no AMX here, or it may not be used", allow_module_level=True)


def test_amx_is_given_back_as_it_was():
    @numba.njit
    def shapes():
        """Before, while and after it is held."""
        before = amx.hold()
        held = amx.hold()
        amx.release(before)
        after = amx.hold()
        amx.release(before)
        return before, held, after

    before, held, after = shapes()
    assert held[0] == 1 and held[16:32:2].tolist() == [64] * 8 and held[48:56].tolist() == [16] * 8
    assert (before == after).all()
