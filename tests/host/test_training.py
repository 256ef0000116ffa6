"""A host's MODEL as teacher, student and proxy: right velocities, right gradients, nothing left."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom
from comfy_extras.nodes_train import LoraModelLoader
from fewstep.flow import uniform
from fewstep.host import loading, sampling, training
from fewstep.host.recomputing import recomputing
from fewstep.tests.host import architectures, published, toys

SHAPE = (16, 8, 8)
CONFIG, WHOLE = (SimpleNamespace(rank=rank, seed=3) for rank in (4, 0))


def prompt(seed, tokens=7):
    draw = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, tokens, 4096, generator=draw)
    return [[cond, {"pooled_output": torch.randn(1, 2048, generator=draw)}]]


POSITIVE, NEGATIVE = prompt(1) + prompt(2) + prompt(3, tokens=11), prompt(4)


def plain(tmp_path):
    return comfy.sd.load_diffusion_model_state_dict(toys.mmdit())


def inference(tmp_path):
    with torch.inference_mode():
        return plain(tmp_path)


def gguf(tmp_path):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    return loading.load_diffusion_model(str(tmp_path / "m.gguf"))


@pytest.fixture(params=[plain, inference, gguf], ids=lambda load: load.__name__)
def model(request, exact, tmp_path):
    return request.param(tmp_path)


@pytest.fixture(params=[CONFIG, WHOLE], ids=["LoRA", "whole weights"])
def config(request):
    return request.param


def open_training(model, recompute=True, **changes):
    given = {"positive": POSITIVE, "negative": NEGATIVE, "shape": SHAPE, "rank": 4, "batch": 2}
    given |= {"each": 20}
    return training.training(model, **(given | changes), recompute=recompute)


def draw(model, seed=7):
    sampler, latent = sampling.make_sampler("euler", None), {"samples": torch.zeros(1, *SHAPE)}
    sigmas = uniform(2, 3.0)
    given = (model, True, seed, 1.0, POSITIVE[:1], NEGATIVE, sampler, sigmas, latent)
    return SamplerCustom.execute(*given).args[0]["samples"]


def noise(n=3, seed=5):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def filled(loras):
    """A set that changes something."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in loras.named_parameters():
            if not name.endswith("down"):
                size = 0.1 if "up" in name else 0.02
                value.copy_(size * torch.randn(value.shape, generator=draw))
    return loras


def test_the_teacher_is_the_model(model):
    drawn = draw(model)
    with open_training(model) as backbone, torch.no_grad():
        text, _ = backbone.read([0], CONFIG, None)
        x, (first, second, _) = None, uniform(2, 3.0)
        start = comfy.sample.prepare_noise(torch.zeros(1, *SHAPE), 7)
        x = start + (second - first) * backbone.velocity(None, start, first[None], text)
        x = x - second * backbone.velocity(None, x, second[None], text)
        ours = backbone.model.process_latent_out(x)
    torch.testing.assert_close(ours, drawn, rtol=1e-4, atol=1e-5)
    assert torch.equal(draw(model), drawn)
    assert not comfy.model_management.in_training


def test_prompts_of_several_lengths_are_told_as_one_by_one(model):
    sigma = torch.tensor([1.0, 0.5, 0.3])
    with open_training(model) as backbone, torch.no_grad():
        text, untold = backbone.read([2, 0, 1], CONFIG, None)
        together = backbone.velocity(None, noise(), sigma, text)
        for i in range(3):
            alone = backbone.velocity(None, noise()[i : i + 1], sigma[i : i + 1], text[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        assert (together - backbone.velocity(None, noise(), sigma, untold)).abs().max() > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_small_differences(model, config, recompute):
    """Also where another set was switched on before the backward."""
    sigma = torch.full((3,), 0.7)
    with open_training(model, recompute) as backbone:
        loras, proxy = filled(backbone.student(config, None)), backbone.proxy(config)
        text, _ = backbone.read([0, 1, 2], config, None)

        def loss():
            first = backbone.velocity(loras, noise(), sigma, text)
            return backbone.velocity(loras, 0.5 * first, sigma, text).square().mean()

        made = loss()
        backbone.velocity(proxy, noise(), sigma, text)
        made.backward()
        way = [torch.zeros_like(p) if p.grad is None else p.grad for p in loras.parameters()]
        length = sum(part.square().sum() for part in way).sqrt()
        assert length > 0 and all(parameter.grad is None for parameter in proxy.parameters())
        values, step = [], 1e-2
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, part in zip(loras.parameters(), way, strict=True):
                    parameter.add_(part, alpha=sign * step / length.item())
                values.append(loss().item())
                for parameter, part in zip(loras.parameters(), way, strict=True):
                    parameter.sub_(part, alpha=sign * step / length.item())
    # central differences: the error is of the step's square
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(length.item(), rel=0.02)


def test_a_kernel_without_a_backward_is_not_asked(model):
    def kernel(*args, **kwargs):
        raise AssertionError

    fast = model.clone()
    fast.model_options["transformer_options"]["optimized_attention_override"] = kernel
    with open_training(fast) as backbone:
        loras = backbone.student(CONFIG, None)
        text, _ = backbone.read([0], CONFIG, None)
        backbone.velocity(loras, noise(1), torch.ones(1), text).sum().backward()


def test_a_frozen_set_passes_its_inputs_gradient_alone(model, config):
    sigma = torch.full((3,), 0.7)
    with open_training(model) as backbone:
        loras = filled(backbone.student(config, None))
        text, _ = backbone.read([0, 1, 2], config, None)
        found = []
        for frozen in (True, False):
            x = noise().requires_grad_()
            with backbone.tapped(loras) as features:
                backbone.velocity(loras, x, sigma, text, frozen)
            sum(feature.square().mean() for feature in features).backward()
            found.append(x.grad)
            assert any(p.grad is not None for p in loras.parameters()) is not frozen
        assert features[0].shape[2] == backbone.features()[1] == 128
        assert len(features) == backbone.features()[0] * 2  # prompts of two lengths: two calls
    torch.testing.assert_close(*found)


def test_what_was_learned_loads_by_the_stock_node(model, config):
    before = draw(model)
    with open_training(model) as backbone, torch.no_grad():
        loras = filled(backbone.student(config, None))
        text, _ = backbone.read([0], config, None)
        start = comfy.sample.prepare_noise(torch.zeros(1, *SHAPE), 7)
        expected = backbone.velocity(loras, start, torch.ones(1), text)
        file = backbone.weights(loras)
        again = backbone.student(config, file)
        for value, own in zip(again.parameters(), loras.parameters(), strict=True):
            assert torch.equal(value, own)
    patched = LoraModelLoader.execute(model, file, 1.0).args[0]
    with open_training(patched) as backbone, torch.no_grad():
        text, _ = backbone.read([0], CONFIG, None)
        loaded = backbone.velocity(None, start, torch.ones(1), text)
    torch.testing.assert_close(loaded, expected, rtol=1e-3, atol=1e-4)
    assert (draw(patched) - before).abs().max() > 1e-3
    assert torch.equal(draw(model), before)


def test_a_start_that_does_not_fit_is_named(exact, tmp_path):
    with open_training(plain(tmp_path)) as backbone:
        file = backbone.weights(backbone.student(CONFIG, None))
        whole = backbone.weights(backbone.student(WHOLE, None))
        name = next(key for key in file if "joint" in key).partition(".lora_")[0]
        up, alpha, bias = (f"{name}.{part}" for part in ("lora_up.weight", "alpha", "diff_b"))
        rank = SimpleNamespace(rank=2, seed=0)
        for given, config, said in (
            (file, rank, r"shape \(4, 256\) .*same model and rank"),
            (file, WHOLE, r"has nothing for .*\.diff, expected .*same model and rank"),
            (whole, CONFIG, r"has nothing for .*lora_down\.weight"),
            (whole | {bias: torch.ones(3)}, WHOLE, rf"has shape \(3,\) for {bias}"),
            (whole | {bias: whole[bias] / 0}, WHOLE, rf"NaN or infinity in {bias}"),
            (file | {up: file[up] / 0}, CONFIG, rf"NaN or infinity in {up}"),
            (file | {alpha: torch.ones(2)}, CONFIG, rf"has 2 numbers for {alpha}, expected one"),
        ):
            with pytest.raises(ValueError, match=said):
                backbone.student(config, given)


def test_memory_is_asked_for_what_learns(monkeypatch):
    """Of whole weights, all of them; of fewer bytes each where the optimizer keeps fewer."""
    model, asked = plain(None), []
    monkeypatch.setattr(training, "check_memory", lambda needed, device: asked.append(needed))
    for rank, each in ((4, 20), (0, 20), (0, 14)):
        with open_training(model, rank=rank, each=each) as backbone:
            layers = backbone.layers.values()
    low = sum(4 * sum(layer.weight.shape) for layer in layers)
    whole = sum(layer.weight.numel() for layer in layers)
    assert asked[1] - asked[2] == 6 * whole
    assert asked[1] - asked[0] == (20 + training.KEPT) * (whole - low)


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_learns_nearly_the_same_and_leaves_the_model(model, recompute):
    before, sigma, found = draw(model), torch.full((3,), 0.7), []
    for dtype in (None, torch.bfloat16):
        with open_training(model, recompute, dtype=dtype) as backbone:
            loras = filled(backbone.student(CONFIG, None))
            text, _ = backbone.read([0, 1, 2], CONFIG, None)
            backbone.velocity(loras, noise(), sigma, text).square().mean().backward()
            learned = [p.grad.flatten() for p in loras.parameters() if p.grad is not None]
            found.append(torch.cat(learned))
    assert not torch.equal(*found)
    # bfloat16 rounds to 2^-9
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999
    assert torch.equal(draw(model), before)


def test_a_block_is_computed_again_once_but_where_it_first_changed_what_was_saved():
    calls, x = [], torch.randn(5, generator=torch.Generator().manual_seed(0))

    def block(x, changes):
        calls.append(changes)
        y = x.exp()
        z = y * y.sin()
        if changes:
            y.mul_(3)
            x += y.sum()
        return (z * x).cos()

    def gradient(forward, changes):
        calls.clear()
        given = x.clone().requires_grad_()
        forward(2 * given, changes).square().sum().backward()
        return given.grad

    again = recomputing(block, lambda: nullcontext)
    for changes, expected in ((False, 2), (True, 3), (True, 2), (False, 2)):
        found = gradient(again, changes)
        assert len(calls) == expected
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            assert torch.equal(found, gradient(block, changes))


# what a prompt's CONDITIONING is of, and a latent's shape
PUBLISHED = {
    "flux": (published.flux, 4096, {"pooled_output": torch.ones(1, 768), "guidance": 3.5}, SHAPE),
    "wan": (published.wan, 4096, {}, (16, 2, 8, 8)),
    "qwen_image": (published.qwen_image, 3584, {}, (16, 1, 8, 8)),
    "z_image": (published.z_image, 2560, {}, SHAPE),
}
SLOW = {"qwen_image", "z_image"}  # of a width that the host knows them by


def of_published(name, _monkeypatch):
    draw = torch.Generator().manual_seed(0)
    shapes = PUBLISHED[name][0]().items()
    return comfy.sd.load_diffusion_model_state_dict(
        {key: 0.03 * torch.randn(shape, generator=draw) for key, shape in shapes}
    )


def others():
    for name, (_, *rest) in PUBLISHED.items():
        marks = [pytest.mark.slow] * (name in SLOW)
        yield pytest.param(of_published, name, *rest, id=name, marks=marks)
    for name, (*_, width, extra, shape) in architectures.SMALL.items():
        yield pytest.param(architectures.load, name, width, extra, shape, id=name)


@pytest.mark.parametrize("make, name, width, extra, shape", list(others()))
def test_others_learn_too(exact, monkeypatch, make, name, width, extra, shape):
    """Recomputing blocks changes no gradient, though some of the host's change in place what the
    backward needs. The second call is as matching makes it: only its input's gradient is asked for.
    """
    model, draw, learned = make(name, monkeypatch), torch.Generator().manual_seed(1), []
    cond = [[torch.randn(1, 5, width, generator=draw), extra]]
    x = torch.randn(1, *shape, generator=draw)
    given = {"positive": cond, "negative": None, "shape": shape, "batch": 1}
    for recompute in (False, True):
        with open_training(model, recompute, **given) as backbone:
            loras = filled(backbone.student(CONFIG, None))
            text, _ = backbone.read([0], CONFIG, None)
            first = backbone.velocity(loras, x, torch.ones(1), text)
            with backbone.tapped(loras) as features:
                made = backbone.velocity(loras, 0.5 * first, torch.ones(1), text, frozen=True)
            (made.square().mean() + features[-1].square().mean()).backward()
            assert features[0].shape[::2] == (1, backbone.features()[1])
            learned.append([p.grad for p in loras.parameters()])
    kept, again = learned
    assert [grad is None for grad in kept] == [grad is None for grad in again]
    kept, again = (torch.cat([g.flatten() for g in one if g is not None]) for one in learned)
    assert kept.isfinite().all() and (again - kept).norm() < 1e-5 * kept.norm()
    seen = [grad is not None and bool(grad.any()) for grad in learned[0]]
    # a last block's text teaches nothing, nor LTX-2's sound, of which there is none
    assert sum(seen) > (0.25 if name == "ltxav" else 0.75) * len(seen)


def test_what_cannot_be_learned_is_refused():
    model = plain(None)
    odd = [[POSITIVE[0][0], POSITIVE[0][1] | {"control": object()}]]
    with (
        pytest.raises(ValueError, match="positive CONDITIONING carries control"),
        open_training(model, positive=odd),
    ):
        pass
    lost = [[POSITIVE[0][0] / 0, POSITIVE[0][1]]]
    with (
        pytest.raises(ValueError, match="positive CONDITIONING holds NaN or infinity"),
        open_training(model, positive=lost),
    ):
        pass
    two = [[POSITIVE[0][0].repeat(2, 1, 1), POSITIVE[0][1]]]
    with (
        pytest.raises(ValueError, match="positive CONDITIONING holds 2 prompts in one entry"),
        open_training(model, positive=two),
    ):
        pass
    bare, narrow = [POSITIVE[0][0], {}], [POSITIVE[0][0][..., :768], POSITIVE[0][1]]
    with open_training(model, positive=[bare, narrow]) as backbone:
        with pytest.raises(ValueError, match="positive CONDITIONING has no pooled_output"):
            backbone.read([0], CONFIG, None)
        text, _ = backbone.read([1], CONFIG, None)
        with pytest.raises(ValueError, match=r"context_embedder takes .* 4096 .* given 768"):
            backbone.velocity(None, noise(1), torch.ones(1), text)
    with (
        pytest.raises(ValueError, match=r"about [\d.]+ GB beside the model"),
        open_training(model, batch=10**9),
    ):
        pass
    assert not comfy.model_management.in_training


def test_empty_latents_only_say_the_size():
    model = plain(None)
    empty, drawn = torch.zeros(3, 16, 4, 4), torch.ones(2, 16, 4, 4)
    assert training.joined(model, [{"samples": empty}, {"samples": empty}]).shape == (1, 16, 4, 4)
    assert torch.equal(training.joined(model, [{"samples": drawn}]), drawn)
    with pytest.raises(ValueError, match="Some latents are pictures and some are empty"):
        training.joined(model, [{"samples": drawn}, {"samples": empty}])


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit")
def test_a_limit_on_the_process_counts_as_memory(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, resource.RLIM_INFINITY))
    with pytest.raises(ValueError, match=r"cpu has 0\.00 free"):
        training.check_memory(1, torch.device("cpu"))
