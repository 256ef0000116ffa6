"""The gradient's noise scale, against one that is known."""

import pytest
import torch
from fewstep.distill.noise import noise_scale
from fewstep.tests.distill import toys


class Known:
    """One weight vector of 1000 whose gradient is 0.1 in each place, plus noise of deviation 1."""

    batch = 4

    def __init__(self, signal=0.1):
        self.student = torch.nn.Linear(1000, 1, bias=False)
        self.config, self.signal = toys.MATCH, signal

    def _sample(self, index, draw):
        return None

    def _loss(self, index, sample, draw):
        noise = torch.randn(self.batch, 1000, generator=draw).mean(0)
        return (self.student.weight * (self.signal + noise)).sum()


def test_noise_scale_is_the_known_one():
    """tr(Σ) = 1000 a sample, |G|² = 1000 · 0.01 = 10: B = 100."""
    assert noise_scale(Known(), step=1, batches=200) == pytest.approx(100, rel=0.1)


def test_without_signal_the_scale_has_no_bound():
    """|G|² is 0, and is estimated to about 1.4 either way of it: 1000 / 1.4 = 700, or infinite."""
    scales = [noise_scale(Known(signal=0.0), step, batches=8) for step in range(4)]
    assert min(scales) > 250  # two and a half deviations


def test_a_student_is_left_as_it_was():
    task = toys.match()
    before = {name: value.clone() for name, value in task.student.state_dict().items()}
    assert noise_scale(task, 3, 3) > 0
    for name, value in task.student.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in task.student.parameters())
