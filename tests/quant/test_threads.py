"""Work on plain threads: the order of results, errors, and threads within threads."""

import threading
import time

import pytest
import torch
from fewstep.quant.threads import in_order, in_threads


@pytest.fixture(autouse=True, params=[1, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items():
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(in_order(slow_first, range(40))) == [item * item for item in range(40)]


def test_an_error_is_raised_in_its_turn_and_ends_all():
    ran = []

    def work(item: int) -> int:
        ran.append(item)
        if item == 3:
            raise ValueError("the third")
        return item

    results = []
    with pytest.raises(ValueError, match="the third"):
        for result in in_order(work, range(1000)):
            results.append(result)
    assert results == [0, 1, 2] and len(ran) < 20
    time.sleep(0.01)
    assert len(ran) < 20


def test_shares_cover_everything_once_and_a_share_within_is_not_shared_again(threads):
    def inner(first: int, end: int) -> tuple[int, int, int]:
        return first, end, threading.get_ident()

    def outer(first: int, end: int) -> list[tuple[int, int, int]]:
        return in_threads(lambda a, b: inner(first + a, first + b), end - first, 2**14)

    shares = [share for part in in_threads(outer, 10, 2**14) for share in part]
    assert len(shares) == threads
    assert [number for first, end, _ in shares for number in range(first, end)] == list(range(10))
