"""What is freed stays while a model samples on a CPU, and is returned when it is unloaded."""

import gc

import comfy.model_management
import pytest
import torch
from fewstep.bench.worker import anonymous_bytes
from fewstep.host import heap, loading
from fewstep.tests.host import toys
from fewstep.tests.host.test_loading import sample

resource = pytest.importorskip("resource")
SIZE, PAGE = 2**25, 4096
SETTLED = 12  # glibc lays its first few aligned results one behind the other

pytestmark = pytest.mark.skipif(heap._glibc() is None, reason="not glibc, or told by its user")


def faults(run) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def use_some(times=1):
    for _ in range(times):
        torch.ones(SIZE // 4)


def test_memory_is_used_again_and_returned():
    heap._keep(None)
    use_some(SETTLED)
    again = faults(use_some)
    kept = anonymous_bytes()
    heap._return(None, True)
    assert again < SIZE // PAGE // 10
    assert anonymous_bytes() <= kept - SIZE // 2


def test_a_clone_takes_it_over():
    heap._keep(None)
    use_some(SETTLED)
    heap._return(None, False)
    assert faults(use_some) < SIZE // PAGE // 10
    heap._return(None, True)


def test_more_than_the_most_is_returned_after_sampling(monkeypatch):
    heap._keep(None)
    use_some(SETTLED)
    kept = anonymous_bytes()
    monkeypatch.setattr(heap, "_RARELY", 0)
    monkeypatch.setattr(heap, "_again", 0.0)
    monkeypatch.setattr(heap, "_MOST", 2**60)
    heap._rest(None)
    assert anonymous_bytes() > kept - SIZE // 2
    monkeypatch.setattr(heap, "_MOST", SIZE // 2)
    heap._rest(None)
    assert anonymous_bytes() <= kept - SIZE // 2
    heap._return(None, True)


def test_glibc_is_seldom_asked_what_is_free(monkeypatch):
    asked, now = [], [0.0]

    def slowly():
        asked.append(now[0])
        now[0] += 0.02
        return 0

    monkeypatch.setattr(heap.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heap, "_unused", slowly)
    monkeypatch.setattr(heap, "_before", 1)
    monkeypatch.setattr(heap, "_again", 0.0)
    for now[0] in (1.0, 2.0, 3.0, 8.0, 9.0):
        heap._rest(None)
    assert asked == [1.0, 8.0]
    heap._return(None, True)


def test_what_was_returned_does_not_count_as_kept(monkeypatch):
    heap._keep(None)
    use_some(SETTLED)
    gap = torch.ones(SIZE // 4)
    above = torch.ones(2**16)  # so that the gap is not the heap's end
    del gap
    monkeypatch.setattr(heap, "_RARELY", 0)
    monkeypatch.setattr(heap, "_again", 0.0)
    monkeypatch.setattr(heap, "_MOST", SIZE // 2)
    heap._rest(None)
    assert heap._glibc().mallinfo2().fordblks > SIZE // 2
    assert heap._unused() - heap._before < SIZE // 2
    heap._return(None, True)
    assert above.all()


@pytest.mark.parametrize("end", ["unloaded", "dropped"])
def test_sampling_keeps_and_the_models_end_returns(monkeypatch, tmp_path, end):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model, told = loading.load_diffusion_model(str(tmp_path / "m.gguf")), []
    gc.collect()  # other tests' models
    monkeypatch.setattr(heap, "_set", told.append)
    sample(model)
    assert told == [heap._KEEPING, heap._RESTING]
    if end == "unloaded":
        model.detach()
    else:
        del model
        comfy.model_management.cleanup_models_gc()
        gc.collect()
    assert told[2:] == [heap._USUAL]


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1", False),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1", False),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1", True),
        ("MALLOC_ARENA_MAX", "1", True),
        ("GLIBC_TUNABLES", "glibc.cpu.x86_shstk=on", True),
    ],
)
def test_who_told_glibc_is_not_overruled(monkeypatch, name, value, ours):
    monkeypatch.setenv(name, value)
    assert (heap._glibc.__wrapped__() is not None) == ours
