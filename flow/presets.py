"""A preset: how one few-step checkpoint wants to be sampled, as one row of data.

The same object is a built-in row (`table.PRESETS`), a user's row (`user_presets`), and what a
checkpoint carries in its GGUF metadata (`metadata`).
"""

import logging
from dataclasses import dataclass

import torch

from .errors import one_of
from .rules import RULES
from .schedules import FORMULAS, check_sigmas, compute, flux2_mu, resample, shift_from_mu

log = logging.getLogger(__name__)

MAX_STEPS = 1000  # a default beyond is a mistake in a file
T5_MODES = ("auto", "encode", "omit", "zeros77", "zeros256")
SURE = {
    "H": "read in the primary source or its code",
    "M": "one credible reader",
    "L": "a summary",
    "G": "our guess: experimental",
}


@dataclass(frozen=True)
class Preset:
    """One way to sample, complete: schedule, step rule, guidance, text.

    steps: the number used when the user names none.
    rows: explicit sigmas, one row for each number of steps (its length less one); they win over
        `formula`.
    formula: "uniform", "sgm_uniform" or "diffusers" (see `schedules`) with `shift`, or "flux2",
        whose shift follows from the latent's tokens; None if there are only rows.
    shift: of the formula, and of the time in which rows are stretched to other numbers of steps
        (None: 1, no shift).
    rule: "euler" or "renoise".  cfg: 1 needs no negative prompt and one model call a step.
    t5: what stands in for T5's tokens; "auto": T5 if it is loaded, else left out.
    latent_sides: for "renoise", the latent's side at each step, one row for each number of steps.
    expert_boundary: for models of two timestep experts, the sigma from which (inclusive, upwards)
        the high-noise expert runs; None for one model.
    note: what the user must add (a LoRA, guidance).  sure: how surely known, a key of `SURE`.
    """

    name: str
    label: str
    steps: int
    rows: tuple[tuple[float, ...], ...] = ()
    formula: str | None = None
    shift: float | None = None
    rule: str = "euler"
    cfg: float = 1.0
    t5: str = "auto"
    latent_sides: tuple[tuple[int, ...], ...] = ()
    expert_boundary: float | None = None
    note: str = ""
    sure: str = "M"
    source: str = ""

    def __post_init__(self):
        """Check the fields, and round numbers to float32, as GGUF keeps them. Raises ValueError."""
        rows = tuple(tuple(check_sigmas(row).tolist()) for row in self.rows)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "latent_sides", tuple(map(tuple, self.latent_sides)))
        for field in ("shift", "cfg", "expert_boundary"):
            object.__setattr__(self, field, float32(getattr(self, field)))
        one_of(self.rule, RULES, "rule")
        one_of(self.t5, T5_MODES, "t5 mode")
        one_of(self.sure, SURE, "sure")
        if self.formula is not None:
            one_of(self.formula, [*FORMULAS, "flux2"], "formula")
        elif not self.rows:
            raise ValueError("there are neither sigmas nor a formula: give a row of sigmas.")
        self._check_numbers()

    def _check_numbers(self):
        if self.formula in FORMULAS and self.shift is None:
            raise ValueError(f"the formula {self.formula} needs a shift (1 for none).")
        for field, rows in (("sigmas", self.rows), ("latent_sides", self.latent_sides)):
            if len({len(row) for row in rows}) < len(rows):
                raise ValueError(f"{field} has two rows for one number of steps: keep one.")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps is {self.steps}: it must lie between 1 and {MAX_STEPS}.")
        if self.shift is not None and not 0 < self.shift < float("inf"):
            raise ValueError(f"shift is {self.shift}: it must be above 0 (1 for none).")
        if not 0 < self.cfg < float("inf"):
            raise ValueError(f"cfg is {self.cfg}: it must be above 0 (1 for no guidance).")
        if self.expert_boundary is not None and not 0 < self.expert_boundary < 1:
            raise ValueError(
                f"expert_boundary is {self.expert_boundary}: a sigma below 1 is meant."
            )
        if not all(type(side) is int and side > 0 for row in self.latent_sides for side in row):
            raise ValueError(
                f"latent_sides is {self.latent_sides}: whole numbers above 0 are meant."
            )
        if not all(row and list(row) == sorted(row) for row in self.latent_sides):
            raise ValueError(f"latent_sides is {self.latent_sides}: a latent only grows.")

    def sigmas(self, steps=None, tokens=None, shift=None, denoise=1.0):
        """The schedule as a float32 tensor (steps+1,) falling to 0.

        Explicit rows come first, then the formula. A number of steps that has neither is made from
        the row nearest to it (`schedules.resample`), and the log says so: dragging 4 to 5 works,
        though the checkpoint was not trained for it. Another `shift` than the preset's re-shifts.
        `denoise` below 1 starts later and keeps the number of steps; 0 gives an empty tensor.
        `tokens` is needed by FLUX.2's formula alone. Raises ValueError.
        """
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps is {steps}: it must be 1 or more.")
        if not self._has_row(steps) and self.formula is not None:
            shift = shift or self._formula_shift(steps, tokens)
            formula = "uniform" if self.formula == "flux2" else self.formula
            return resample(compute(formula, steps, shift), steps, shift, denoise=denoise)
        row = torch.tensor(self._nearest_row(steps))
        return resample(row, steps, self.shift or 1.0, shift, denoise)

    def _has_row(self, steps):
        return any(len(row) == steps + 1 for row in self.rows)

    def _nearest_row(self, steps):
        """The row for `steps` steps, or the nearest one (of two, the longer), with a log line."""
        row = min(self.rows, key=lambda row: (abs(len(row) - 1 - steps), -len(row)))
        if len(row) != steps + 1:
            known = ", ".join(str(len(row) - 1) for row in self.rows)
            log.info(
                "%s has no sigmas for %d steps (it has them for %s): those for %d are stretched.",
                *(self.name, steps, known, len(row) - 1),
            )
        return row

    def _formula_shift(self, steps, tokens):
        if self.formula != "flux2":
            return self.shift
        if tokens is None:
            raise ValueError(
                f"The schedule of {self.name} depends on the picture's size: connect the latent, "
                f"or set a shift."
            )
        return shift_from_mu(flux2_mu(tokens, steps))


def float32(value):
    """`value` rounded to float32; None stays None."""
    return None if value is None else torch.tensor(value, dtype=torch.float32).item()
