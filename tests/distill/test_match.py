"""Distribution matching against hand-computed toys."""

import pytest
import torch
from fewstep.distill.adversarial import Heads, judge_loss, student_loss, tapped
from fewstep.distill.match import RENOISE, MatchConfig, matching_loss
from fewstep.distill.merge import merge
from fewstep.tests.distill import toys


def test_gradient_is_the_difference_of_scores_over_the_distance_to_the_teacher():
    """By hand: x0 = 1, real 3, fake 4 and 0: g = (fake − real) / |1 − 3|, mean over 2 values."""
    x0 = torch.ones(1, 1, 1, 2, requires_grad=True)
    real, fake = torch.full((1, 1, 1, 2), 3.0), torch.tensor([[[[4.0, 0.0]]]])
    matching_loss(x0, real, fake).backward()
    assert torch.allclose(x0.grad, torch.tensor([[[[0.5, -1.5]]]]) / 2)


def test_nothing_moves_where_teacher_and_proxy_agree():
    x0 = torch.randn(2, 16, 4, 4, requires_grad=True)
    seen = torch.randn(2, 16, 4, 4)
    matching_loss(x0, seen, seen).backward()
    assert not x0.grad.any()


def renoised(how, i, **changes):
    task = toys.match(renoise=how, **changes)
    x, v = torch.randn(2, 4, *toys.SHAPE)
    sigma = task.sigmas[i]
    x0 = x - sigma * v
    noise, s = task._renoise(i, x0, v, torch.Generator().manual_seed(0))
    return x, v, sigma, torch.lerp(x0, noise, s[:, None, None, None]), s


@pytest.mark.parametrize("i", [0, 1, 2])
def test_shared_renoising_is_the_students_own_next_state(i):
    x, v, sigma, noisy, s = renoised("shared", i)
    following = toys.MATCH.sigmas[i + 1]
    assert torch.allclose(s, torch.tensor(following))
    assert torch.allclose(noisy, x + (following - sigma) * v, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 1.0, 0.0])
def test_the_last_step_is_compared_on_its_way(share):
    x, v, sigma, noisy, s = renoised("shared", 3, last_sigma=share)
    assert torch.allclose(s, share * sigma.expand(4))
    assert torch.allclose(noisy, x + (share - 1) * sigma * v, atol=1e-5)


def test_random_renoising_draws_noise_and_level_anew():
    *_, s = renoised("random", 1)
    assert len(s.unique()) == 4 and (s > 0).all() and (s < 1).all()


@pytest.mark.parametrize("how", ["random", "levels"])
def test_noise_is_drawn_anew(how):
    task = toys.match(renoise=how)
    x0, v = torch.zeros(2, 4, *toys.SHAPE)
    noise, s = task._renoise(1, x0, v, torch.Generator().manual_seed(0))
    assert (noise.std() - 1).abs() < 0.05
    assert torch.equal(s, torch.full((4,), 0.75)) == (how == "levels")  # the student's next one


def test_gradient_of_a_step_is_the_hand_computed_one():
    """With its heads switched off, the loss of step 1 is made again from the networks by hand."""
    task = toys.match(adversarial=0.0, clip=1e9)
    for parameter in task.proxy.parameters():
        parameter.data.add_(0.01 * torch.randn(parameter.shape))
    draw = torch.Generator().manual_seed(0)
    sample = task._sample(1, draw)
    loss = task._loss(1, sample, draw)
    loss.backward()
    x = task._walk(sample, 1)
    v = task._velocity(task.student, x, task.sigmas[1], sample.told)
    s = task.sigmas[2]
    noisy = (x + (s - task.sigmas[1]) * v).detach()
    x0 = x - task.sigmas[1] * v
    real = noisy - s * task._guided(noisy, s, sample)
    fake = noisy - s * task._velocity(task.proxy, noisy, s, sample.told).detach()
    g = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True).detach()
    weight = task.student.final_layer.linear.weight
    (expected,) = torch.autograd.grad(x0, weight, g / x0.numel())
    assert expected.norm() > 0
    assert torch.allclose(weight.grad, expected, rtol=0.02, atol=0.02 * expected.abs().max())


def test_last_step_can_be_left_to_the_heads():
    task = toys.match(last_sigma=0.0)
    draw = torch.Generator().manual_seed(0)
    loss = task._loss(3, task._sample(3, draw), draw)
    assert "matching" not in task.metrics
    assert torch.allclose(loss, task.config.adversarial * task.metrics["adversarial"])


def test_proxy_follows_the_student():
    task = toys.match(ida=0.9)
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    for parameter in task.student.parameters():
        parameter.data.add_(1.0)
    before = task.proxy.get_parameter(name).clone()
    task._follow()
    assert torch.allclose(task.proxy.get_parameter(name), before + 0.1, atol=1e-5)


def test_proxy_follows_a_lora_too():
    task = toys.match(ida=0.0, rank=2)
    for i in range(2):
        task.step(i, 0.0)
    task._follow()
    layer = "joint_blocks.0.x_block.mlp.fc1"
    student = task.student.get_submodule(layer).weight
    assert torch.allclose(task.proxy.get_submodule(layer).weight, student)


def test_proxy_learns_the_students_latents():
    frozen = {"adam_rate": 0.0, "ida": 1.0, "adversarial": 0.0}
    task = toys.match(**frozen, renoise="random", proxy_rate=2e-3, proxy_steps=4)
    losses = []
    for i in range(40):
        task.step(4 * i, 0.0)  # always of the first step
        losses.append(task.metrics["proxy"].item())
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_the_proxy_learns_alone_at_first():
    task = toys.match(proxy_warmup=2)
    student, proxy = (
        {name: value.clone() for name, value in network.state_dict().items()}
        for network in (task.student, task.proxy)
    )
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    for i in range(2):
        task.step(i, 0.0)
    assert torch.equal(task.student.state_dict()[name], student[name])
    assert not torch.equal(task.proxy.state_dict()[name], proxy[name])
    task.step(2, 0.0)
    assert not torch.equal(task.student.state_dict()[name], student[name])


def test_the_students_rate_rises_when_its_turn_has_come():
    task = toys.match(proxy_warmup=3, warmup=4)
    for i in range(5):
        task.step(i, 0.0)
        student = task.optimizers[0].param_groups[0]
        assert student["lr"] == pytest.approx(student["peak"] * (1 if i < 3 else (i - 2) / 4))
        proxy = task.proxy_optimizer.param_groups[0]
        assert proxy["lr"] == pytest.approx(proxy["peak"] * min(1, (i + 1) / 4))


@pytest.mark.parametrize("renoise", RENOISE)
def test_proxy_and_heads_learn_from_fresh_noise_at_the_levels_compared(monkeypatch, renoise):
    """So that the proxy's velocity is the student's distribution's, and no repetition of it."""
    task = toys.match(renoise=renoise, proxy_steps=2)
    seen, plain = [], task._velocity
    monkeypatch.setattr(
        task,
        "_velocity",
        lambda n, x, s, *rest, **k: seen.append((n, x, s)) or plain(n, x, s, *rest, **k),
    )
    task.step(1, 0.0)
    asked = [(x, s) for network, x, s in seen if network is task.proxy]
    taught = asked[-4:]  # twice what the student made and what is real
    assert len({tuple(x.flatten().tolist()) for x, _ in taught}) == 4
    sample, i, x0 = task.made
    for (x, sigma), what in zip(taught, [x0, sample.latents] * 2, strict=True):
        s = sigma.expand(4)[:, None, None, None]
        noise = (x - (1 - s) * what) / s
        assert (noise.mean().abs() < 0.1) and (noise.std() - 1).abs() < 0.05
        assert torch.allclose(s, task.sigmas[i + 1].expand_as(s)) == (renoise != "random")


def test_only_the_branchs_steps_are_trained():
    assert MatchConfig(branch=(0.5, 1.0)).steps() == [0, 1, 2]
    assert MatchConfig(branch=(0.0, 0.5)).steps() == [3]
    task = toys.match(branch=(0.0, 0.5))
    task.step(0, 0.0)
    assert task.made[1] == 3


def test_a_branch_begins_where_the_student_was_before():
    """Its own network learns the last step alone, and must not draw the states before it."""
    task = toys.match(branch=(0.0, 0.5))
    sample = task._sample(0, torch.Generator().manual_seed(0))
    task._make(0, sample)
    before = task.made[2]
    for name, parameter in task.student.named_parameters():
        if "final_layer" not in name:
            parameter.data.zero_()
    x = task._walk(sample, 3, task.before)
    v = task._velocity(task.student, x, task.sigmas[3], sample.told)
    task._make(0, sample)
    assert torch.equal(task.made[2], (x - task.sigmas[3] * v).detach())
    assert not torch.equal(task.made[2], before)
    high = toys.match(branch=(0.5, 1.0))
    assert high.before is high.student


@pytest.mark.parametrize("changes", [{"renoise": "often"}, {"branch": (0.0, 0.2)}])
def test_names_what_cannot_be(changes):
    with pytest.raises(ValueError, match=str(next(iter(changes.values()))).replace("(", r"\(")[:4]):
        MatchConfig(**changes)


def test_heads_learn_to_tell_and_start_anew_as_often_as_asked():
    draw = torch.Generator().manual_seed(0)
    heads = Heads(2, 64, draw)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    real, made = torch.randn(2, 8, 5, 64) + 0.3, torch.randn(2, 8, 5, 64) - 0.3
    losses = []
    for _ in range(30):
        loss = judge_loss(heads(list(real)), heads(list(made)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]
    assert student_loss(heads(list(made))) > student_loss(heads(list(real)))
    kept = heads.heads[0][1].weight.clone()
    assert heads.restart(0.0, draw, optimizer) == [] and len(optimizer.state) == 12
    assert heads.restart(1.0, draw, optimizer) == [0, 1] and not optimizer.state
    assert not torch.equal(heads.heads[0][1].weight, kept)
    often = [len(heads.restart(0.25, draw, optimizer)) for _ in range(400)]
    assert abs(sum(often) / 800 - 0.25) < 0.05  # three standard deviations of 800 draws


def test_tapped_sees_the_pictures_tokens_and_leaves_no_hook():
    task = toys.match()
    sample = task._sample(0, torch.Generator().manual_seed(0))
    with tapped(task.proxy.joint_blocks) as features:
        task._velocity(task.proxy, sample.noise, task.sigmas[0], sample.told)
    assert [f.shape for f in features] == [(4, 16, 64)]
    assert not task.proxy.joint_blocks[0]._forward_hooks


def test_branches_merge_by_interpolation():
    low, high = (
        {"a": torch.zeros(2), "n": torch.tensor(3)},
        {"a": torch.ones(2), "n": torch.tensor(3)},
    )
    assert (
        torch.allclose(merge(low, high, 0.3)["a"], torch.tensor(0.3))
        and merge(low, high, 0.3)["n"] == 3
    )
    with pytest.raises(ValueError, match="has n"):
        merge(low, {"a": torch.ones(2)}, 0.5)
