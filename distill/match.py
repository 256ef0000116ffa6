"""Stage 2, distribution matching: the student's latents come to lie where the teacher's do.

A proxy ("fake score") keeps learning the velocity of what the student makes. Where proxy and
teacher differ at a noisy latent x' lies the way on which the student's x0 should go:

    v  = student(x_i, s_i),  x0 = x_i − s_i·v                    x_i from the student's own steps
    x' = (1 − s')·x0 + s'·noise'
    x0_real = x' − s'·teacher(x', s'),  x0_fake = x' − s'·proxy(x', s')       without gradient
    g  = (x0_fake − x0_real) / mean|x0 − x0_real|,   loss = ½ ‖x0 − stopgrad(x0 − g)‖²

`renoise` says what noise' and s' are.
- "random": fresh noise and a random s', as in DMD2 (arXiv 2405.14867, eq. 3 and its code's
  normalisation).
- "shared", timestep sharing (SD3.5-Flash, arXiv 2509.21318): the noise that the student itself
  still sees in x_i, noise' = x0 + v, and its own next timestep s' = s_{i+1}, so that x' is its next
  state x_i + (s_{i+1} − s_i)·v. The last step has s_{i+1} = 0, where nothing can be compared: see
  `last_sigma`, ours.

The proxy learns flow matching on the same latents, noised the same way: its velocity at (x', s') is
to be noise' − x0. (With guidance in the student, x0 of its first step is no picture yet but the
guided mean, in the miniature 2.8 times as wide as the data, and a proxy that saw it under fresh
noise learned little else.) After each of the student's steps the proxy moves 2 % of the way to the
student: IDA, SenseFlow, arXiv 2506.00523. Loss weights, rates and the ratio of updates are not
published for SD3.5-Flash.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adversarial import Heads, judge_loss, student_loss
from .optimize import Adam, set_rates, update
from .student import Sample, StudentConfig, StudentTask, per_sample

RENOISE = ("shared", "random")


@dataclass(frozen=True)
class MatchConfig(StudentConfig):
    renoise: str = "shared"
    proxy_renoise: str | None = None  # of what the proxy learns from; None: as `renoise`
    proxy_warmup: int = 15  # steps in which only the proxy and the heads learn
    last_sigma: float = 0.5  # s' of the last step, in its own s_i; 0: heads alone judge that step
    random_shift: float = 3.0  # of the uniform time that "random" draws s' from
    proxy_steps: int = 2  # updates of the proxy for each of the student (TTUR); DMD2 5, SwD 5
    proxy_rate: float = 2e-4
    ida: float = 0.98  # share of itself that the proxy keeps after a step of the student
    adversarial: float = 0.01  # weight of the heads in the student's loss; SwD 0.005 to 0.01
    head_rate: float = 1e-3
    restart: float = 0.005  # chance a step that a head starts anew
    branch: tuple[float, float] = (0.0, 1.0)  # sigmas (above, up to) whose steps are trained
    batch: int = 32

    def __post_init__(self):
        """Raises: ValueError for a renoise that there is not, or a branch without any step."""
        super().__post_init__()
        for field, known in (("renoise", RENOISE), ("proxy_renoise", (*RENOISE, None))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}: expected one of {known}")
        if not self.steps():
            raise ValueError(f"no step of {self.sigmas} starts in the branch {self.branch}")

    def steps(self) -> list[int]:
        """The student's steps that start inside the branch."""
        above, upto = self.branch
        return [i for i, sigma in enumerate(self.sigmas[:-1]) if above < sigma <= upto]


def matching_loss(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """DMD2's loss, whose gradient in x0 is g / numel, g as above; all (n, channels, …)."""
    with torch.no_grad():
        each = tuple(range(1, x0.ndim))
        scale = (x0 - x0_real).abs().mean(each, keepdim=True).clamp(min=1e-4)
        target = x0 - (x0_fake - x0_real) / scale
    return 0.5 * nn.functional.mse_loss(x0, target)


class MatchTask(StudentTask):
    """Stage 2 as a task for `distill.loop.train`, and stage 3 with a `branch`."""

    name = "match"
    starts_far = False

    def __init__(self, config: MatchConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.proxy = self.backbone.proxy(config)
        draw = torch.Generator().manual_seed(config.seed)
        self.heads = Heads(*self.backbone.features(), draw).to(self.device)
        self.proxy_optimizer = _build(self.adam, self.proxy, config.proxy_rate)
        self.head_optimizer = _build(self.adam, self.heads, config.head_rate)
        self.learn_proxy = self.processes.averaging(self.proxy, self._proxy_loss)
        self.learn_heads = self.processes.averaging(self.heads, self._judged)

    def step(self, index: int, progress: float) -> Tensor:
        rate = min((index + 1) / self.config.warmup, 1.0)
        set_rates([self.proxy_optimizer, self.head_optimizer], rate)
        if index < self.config.proxy_warmup:
            with torch.no_grad():
                draw = self._draw(index)
                loss = self._loss(index, self._sample(index, draw), draw)
                loss = self.processes.mean(loss)
        else:
            loss = super().step(index, progress)
            self._follow()
        draw = torch.Generator().manual_seed((self.config.seed + 1) * 3_000_017 + index)
        for _ in range(self.config.proxy_steps):
            self._teach_proxy(draw)
        if self.config.adversarial:
            self.heads.restart(self.config.restart, draw, self.head_optimizer)
        return loss

    def _loss(self, index: int, sample: Sample, draw: torch.Generator) -> Tensor:
        steps = self.config.steps()
        i = steps[index % len(steps)]
        x = self._walk(sample, i)
        v = self._velocity(self.student, x, self.sigmas[i], sample.told)
        x0 = x - self.sigmas[i] * v
        self.made = (sample, i, x0.detach(), v.detach())
        noise, sigma = self._renoise(self.config.renoise, i, x0, v, draw)
        noisy = torch.lerp(x0, noise, per_sample(sigma, x0))
        x0_real, x0_fake, logits = self._compare(noisy, sigma, sample)
        loss = torch.zeros((), device=x.device)
        if sigma.all():
            loss = matching_loss(x0, x0_real, x0_fake)
            self.metrics["matching"] = loss.detach()
        if self.config.adversarial:
            fooled = student_loss(logits)
            self.metrics["adversarial"] = fooled.detach()
            loss = loss + self.config.adversarial * fooled
        return loss

    def _renoise(
        self, how: str, i: int, x0: Tensor, v: Tensor, draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Noise like x0, and its level (n,), of what is made in step `i`; see the file's head."""
        if how == "shared":
            following = self.sigmas[i + 1] or self.config.last_sigma * self.sigmas[i]
            return x0 + v, following.to(x0).expand(len(x0))
        shift, whole = self.config.random_shift, len(x0) * self.processes.count
        time = self.processes.own(torch.rand(whole, generator=draw))
        sigma = (shift * time / (1 + (shift - 1) * time)).clamp(0.02, 0.98)
        return self._noise_like(x0, draw), sigma.to(x0)

    def _compare(
        self, noisy: Tensor, sigma: Tensor, sample: Sample
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x0 as teacher and proxy see it, without gradient, and the heads' logits, with one."""
        with self.backbone.tapped(self.proxy) as features:
            fake = self._velocity(self.proxy, noisy, sigma, sample.told, frozen=True)
        logits = self.heads(features)
        x, s = noisy.detach(), per_sample(sigma, noisy)
        return x - s * self._guided(x, sigma, sample), x - s * fake.detach(), logits

    def _follow(self) -> None:
        """IDA: the proxy moves towards the student."""
        self.backbone.follow(self.proxy, self.student, 1 - self.config.ida)

    def _teach_proxy(self, draw: torch.Generator) -> None:
        """One update of the proxy on the student's last latents, and one of the heads."""
        sample, i, x0, v = self.made
        how = self.config.proxy_renoise or self.config.renoise
        noise, sigma = self._renoise(how, i, x0, v, draw)
        level = per_sample(sigma, x0)
        loss = self.learn_proxy(torch.lerp(x0, noise, level), sigma, noise - x0, sample)
        update(loss, [self.proxy_optimizer], self.config.clip)
        self.metrics["proxy"] = loss.detach()
        if self.config.adversarial:
            fresh = self._noise_like(x0, draw)
            with torch.no_grad(), self.backbone.tapped(self.proxy) as real:
                noisy = torch.lerp(sample.latents, fresh, level)
                self._velocity(self.proxy, noisy, sigma, sample.told)
            judged = self.learn_heads(real, [feature.detach() for feature in self.made_features])
            update(judged, [self.head_optimizer], self.config.clip)
            self.metrics["judge"] = judged.detach()

    def _proxy_loss(self, x: Tensor, sigma: Tensor, velocity: Tensor, sample: Sample) -> Tensor:
        """Flow matching; what the blocks made of x is left in `made_features` for the heads."""
        with self.backbone.tapped(self.proxy) as self.made_features:
            made = self._velocity(self.proxy, x, sigma, sample.told)
        return nn.functional.mse_loss(made, velocity)

    def _judged(self, real: list[Tensor], made: list[Tensor]) -> Tensor:
        return judge_loss(self.heads(real), self.heads(made))

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "proxy": self.proxy.state_dict(),
            "heads": self.heads.state_dict(),
            "proxy_optimizer": self.proxy_optimizer.state_dict(),
            "head_optimizer": self.head_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for part in ("proxy", "heads", "proxy_optimizer", "head_optimizer"):
            getattr(self, part).load_state_dict(state[part])


def _build(adam: Adam, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [{"params": learned, "peak": rate}]
    return adam(groups, lr=rate, betas=(0.5, 0.99), weight_decay=0.0)
