"""Sigma schedules: float32 tensors of n+1 noise levels that fall from at most 1 to exactly 0.

A few-step model knows only the noise levels that it was trained at, so a schedule here is data or
a named formula, never whatever a scheduler of the same name computes. `u` is time before the
shift, linear from 1 (noise) to 0 (picture); `sigma` is time after it:

    sigma = s·u / (1 + (s - 1)·u)      (Esser et al. 2024, arXiv 2403.03206, eq. 23)

BFL's `mu` is log(s). Arithmetic runs in float64 and is rounded to float32 once.
"""

import math
import re
from collections.abc import Sequence

import torch

from .errors import one_of

NUMBER = re.compile(r"[^\s,;]+")


def shift_time(u, shift):
    """Time `u` in [0, 1] after the shift; `shift` 1 changes nothing."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(sigma, shift):
    """The inverse of `shift_time`."""
    return shift_time(sigma, 1 / shift)


def shift_from_mu(mu):
    """BFL's exponential shift: sigma = e^mu / (e^mu + 1/u - 1)."""
    return math.exp(mu)


def uniform(steps, shift=1.0):
    """(steps+1,) sigmas, evenly spaced before the shift: u = 1 - i/steps."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def sgm_uniform(steps, shift=1.0):
    """(steps+1,) sigmas of ComfyUI's scheduler `sgm_uniform` on an SD3-type model.

    Evenly spaced from 1 towards the least training sigma, which is itself shifted, so that every
    value lies a little above `uniform`. Source: comfy.samplers.normal_scheduler with sgm=True.
    """
    least = shift_time(1 / 1000, shift)
    u = torch.linspace(1, least, steps + 1, dtype=torch.float64)
    u[-1] = 0
    return shift_time(u, shift).float()


def diffusers(steps, shift=1.0):
    """(steps+1,) sigmas of diffusers' FlowMatchEulerDiscreteScheduler with its default options.

    The least training sigma is shifted twice and kept, so the last step does almost nothing.
    Source: FlowMatchEulerDiscreteScheduler.__init__ and set_timesteps.
    """
    least = shift_time(1 / 1000, shift)
    u = torch.linspace(1, least, steps, dtype=torch.float64)
    return torch.cat([shift_time(u, shift), u.new_zeros(1)]).float()


def flux2_mu(tokens, steps):
    """FLUX.2's mu for a latent of `tokens` tokens (pixels / 16²) drawn in `steps` steps.

    Source: black-forest-labs/flux2, src/flux2/sampling.py, compute_empirical_mu.
    """
    mu_200 = 1.6927e-4 * tokens + 0.45666666
    if tokens > 4300:
        return mu_200
    mu_10 = 8.73809524e-5 * tokens + 1.89833333
    slope = (mu_200 - mu_10) / 190
    return slope * steps + mu_200 - 200 * slope


FORMULAS = {"uniform": uniform, "sgm_uniform": sgm_uniform, "diffusers": diffusers}


def compute(formula, steps, shift):
    """(steps+1,) sigmas of a formula by its name. Raises ValueError on an unknown name."""
    return FORMULAS[one_of(formula, FORMULAS, "formula")](steps, shift)


def resample(sigmas, steps, shift=1.0, new_shift=None, denoise=1.0):
    """Stretch known `sigmas` (m+1,) to `steps` steps, another shift, or a later start.

    The known levels are joined by straight lines in `u`, the time before `shift`, and read at
    `steps`+1 even places: all of the way, or with `denoise` d below 1 the last part, from 1-d on.
    That is ComfyUI's own rule for denoise (compute steps/d, keep the last), made continuous: the
    number of steps stays what was asked for. On a `uniform` schedule it equals the formula.
    `denoise` 0 gives no sigmas at all: nothing to do.
    """
    if not 0 <= denoise <= 1:
        raise ValueError(f"denoise is {denoise}: it must lie between 0 and 1.")
    if denoise == 0:
        return sigmas.new_empty(0)
    if new_shift is None:
        new_shift = shift
    if steps == len(sigmas) - 1 and denoise == 1 and new_shift == shift:
        return sigmas
    u = unshift_time(sigmas.double(), shift)
    return shift_time(at_even_places(u, steps, 1 - denoise), new_shift).float()


def at_even_places(values, steps, start):
    """`values` (m+1,), joined by lines, read at steps+1 even places from `start` in [0, 1) to 1."""
    places = torch.linspace(start, 1, steps + 1, dtype=torch.float64) * (len(values) - 1)
    left = places.floor().long().clamp(max=len(values) - 2)
    return torch.lerp(values[left], values[left + 1], places - left)


def parse_sigmas(text):
    """Sigmas typed by a person, such as "1, .9, .75, .5, 0", as a checked float32 tensor."""
    numbers = []
    for word in NUMBER.findall(text):
        try:
            numbers.append(float(word))
        except ValueError:
            raise ValueError(
                f"{word!r} in the sigmas is not a number. Write falling numbers with commas "
                f"between them, such as 1, .9, .75, .5, 0"
            ) from None
    return check_sigmas(numbers)


def check_sigmas(sigmas: Sequence[float] | torch.Tensor):
    """Return `sigmas` as a float32 tensor (n+1,), or raise ValueError naming value and remedy.

    They must be at least two, finite, at most 1, falling, and end in exactly 0.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32).cpu()
    listed = ", ".join(f"{value:.6g}" for value in sigmas.flatten().tolist())
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"Sigmas need at least two values, a start and 0; these are [{listed}].")
    for i, value in enumerate(sigmas.tolist()):
        if not 0 <= value <= 1:  # also catches NaN
            raise ValueError(
                f"Sigma {value:.6g} at place {i} of [{listed}] lies outside 0 to 1, the range of "
                f"flow models (1 is pure noise). Divide by 1000 if these are timesteps."
            )
        if i and value >= sigmas[i - 1]:
            raise ValueError(
                f"Sigma {value:.6g} at place {i} of [{listed}] does not fall below the one "
                f"before it. Order the sigmas from noise to 0."
            )
    if sigmas[-1] != 0:
        raise ValueError(f"The sigmas [{listed}] end in {sigmas[-1]:.6g}. Add a 0 at their end.")
    return sigmas
