"""Parts of a kernel on torch's threads, or on threads of our own; and long rows of items."""

import importlib
import signal
import threading
import time

import pytest
import torch
from fewstep.quant.threads import in_order, in_threads

MODULE = importlib.import_module("fewstep.quant.threads")


@pytest.fixture(params=["OpenMP", "pool"], autouse=True)
def way(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(MODULE, "_openmp", lambda: None)
    elif MODULE._openmp() is None:
        pytest.skip("torch's OpenMP library shows no GOMP_parallel")
    return request.param


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_each_part_is_done_once(n):
    done, lock = [0] * n, threading.Lock()

    def work(first, end):
        with lock:
            for i in range(first, end):
                done[i] += 1

    for _ in range(20):
        in_threads(work, n, 2**20)
    assert done == [20] * n


def test_parts_run_side_by_side(threads):
    together = threading.Barrier(threads)
    in_threads(lambda first, end: together.wait(timeout=60), threads, 2**20)


def test_little_work_stays_in_one_thread():
    parts = []
    in_threads(lambda *part: parts.append(part), 100, 1)
    assert parts == [(0, 100)]


def test_what_a_part_raises_is_raised():
    def work(first, end):
        if end == 10:
            raise ValueError("in the last part")

    for _ in range(2):
        with pytest.raises(ValueError, match="in the last part"):
            in_threads(work, 10, 2**20)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer whose signal interrupts")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_is_raised_even_as_c_calls_python(way):
    if way == "pool":
        pytest.skip("there an interrupt can strike between the parts that are handed over")
    caught = struck = armed = False

    def strike(*_):
        nonlocal struck
        if armed and not struck:
            struck = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        for _ in range(3000):
            caught = struck = False
            try:
                armed = True
                assert None not in in_threads(lambda *part: part, 10, 2**20)
                armed = False
            except KeyboardInterrupt:
                caught = True
            armed = False
            assert caught == struck
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_works_from_any_thread(threads):
    """ComfyUI runs a prompt in a thread of its own."""
    parts = []
    caller = threading.Thread(target=in_threads, args=(lambda *p: parts.append(p), 6, 2**20))
    caller.start()
    caller.join(timeout=60)
    assert len(parts) == threads


def test_results_stand_in_the_order_of_the_parts(threads):
    shares = in_threads(lambda first, end: list(range(first, end)), 10, 2**14)
    assert len(shares) == threads and [n for share in shares for n in share] == list(range(10))


def test_items_come_in_their_order():
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(in_order(slow_first, range(40))) == [item * item for item in range(40)]


def test_an_items_error_is_raised_in_its_turn_and_ends_all():
    begun, results = [], []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("the third")
        return item

    with pytest.raises(ValueError, match="the third"):
        for result in in_order(work, range(1000)):
            results.append(result)
    assert results == [0, 1, 2] and len(begun) < 20
    time.sleep(0.01)
    assert len(begun) < 20


def test_within_an_item_parts_stay_on_its_thread(threads):
    def item(_) -> list[int]:
        here = threading.get_ident()
        return [there == here for there in in_threads(lambda *_: threading.get_ident(), 8, 2**20)]

    assert list(in_order(item, range(8))) == [[True]] * 8
