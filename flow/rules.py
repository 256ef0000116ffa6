"""Step rules: two samplers in k-diffusion's grammar, for models in flow space.

    x = (1 - sigma)·x0 + sigma·noise        model(x, sigma·ones(batch), **extra_args) -> denoised

`euler` follows the velocity to the next sigma; `renoise` jumps to `denoised` and adds fresh noise
for the next sigma (what consistency models and SwD do). Nothing here knows ComfyUI; progress is the
callback's business, so `disable` (k-diffusion's switch for its bar) has no effect.
"""

import logging

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)


@torch.no_grad()
def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler steps along the velocity (x - denoised) / sigma. Source: Karras et al. 2022, Alg. 1."""
    extra_args = {} if extra_args is None else extra_args
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = model(x, sigma * ones, **extra_args)
        report(callback, x, i, sigma, denoised)
        velocity = (x - denoised) / sigma
        x = x + velocity * (sigma_next - sigma)
    return x


@torch.no_grad()
def sample_renoise(
    model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None, sides=()
):
    """Jump to denoised, then x = (1 - sigma_next)·denoised + sigma_next·fresh noise.

    Noise comes from extra_args["seed"] as in k-diffusion's stochastic samplers. `sides` holds
    rows of the latent's side at each step, the last standing for the size of `x`: the steps before
    run on a smaller latent, and `denoised` is enlarged (bicubic) in between. Without a row of as
    many steps, or from below sigma 1 (x then holds a picture), all steps run at full size.
    Source: SwD (arXiv 2503.16397), Algorithm 2 and src/utils/flow_matching_sampler.py.
    """
    extra_args = {} if extra_args is None else extra_args
    noise_sampler = noise_sampler or seeded_noise(x, extra_args.get("seed"))
    sizes = step_sizes(x, sigmas, sides, extra_args.get("denoise_mask"))
    x = crop(x, sizes[0])  # cropped noise is still noise
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = model(x, sigma * ones, **extra_args)
        report(callback, x, i, sigma, denoised)
        x = denoised
        if sigma_next > 0:
            noise = crop(noise_sampler(sigma, sigma_next), sizes[i + 1])
            x = sigma_next * noise + (1 - sigma_next) * enlarge(denoised, sizes[i + 1])
    return x


RULES = {"euler": sample_euler, "renoise": sample_renoise}


def report(callback, x, i, sigma, denoised):
    """Tell k-diffusion's callback about step `i`, if there is one."""
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


def seeded_noise(x, seed):
    """A noise sampler for tensors like `x`, with a generator of its own; seed None: torch's.

    On the CPU the seed is raised by one, since ComfyUI draws the start noise there from the same
    seed: without it the first fresh noise would be the start noise again.
    """
    generator = None
    if seed is not None:
        generator = torch.Generator(device=x.device)
        generator.manual_seed((seed + 1) % 2**64 if x.device.type == "cpu" else seed)

    def draw(sigma, sigma_next):
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)

    return draw


def step_sizes(x, sigmas, sides, denoise_mask):
    """(height, width) of the latent at each step, in latent pixels; the last one is that of `x`."""
    height, width = x.shape[-2:]
    steps = len(sigmas) - 1
    row = next((row for row in sides if len(row) == steps), None)
    if row is None or sigmas[0] < 1:
        if sides:
            log.info("No latent sides for these %d steps: all run at full size.", steps)
        return [(height, width)] * max(steps + 1, 1)
    if denoise_mask is not None:
        raise ValueError(
            "A noise mask does not fit a schedule that enlarges the latent between its steps. "
            "Remove the mask, lower denoise below 1, or choose another preset."
        )
    sizes = [tuple(max(1, round(n * side / row[-1])) for n in (height, width)) for side in row]
    return [*sizes, (height, width)]


def crop(x, size):
    """The upper left part of `x` (..., H, W) of `size` (height, width)."""
    return x[..., : size[0], : size[1]]


def enlarge(x, size):
    """`x` (..., H, W) resized to `size` (height, width), bicubic; itself if it fits already."""
    if tuple(x.shape[-2:]) == size:
        return x
    flat = x.reshape(-1, 1, *x.shape[-2:])  # also takes (B, C, T, H, W)
    return F.interpolate(flat, size=size, mode="bicubic").reshape(*x.shape[:-2], *size)
