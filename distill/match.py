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
- "levels", ours, between the two: fresh noise at the student's own next timestep.

The proxy learns flow matching on the student's latents under fresh noise, at the levels that are
compared: only so is its velocity the one of the student's distribution, as the teacher's is of the
data's. (Taught with the student's own noise it would learn to repeat the student: x0_fake = x0, and
g would pull x0 towards what the teacher makes of it in a single step, a blur.) The heads judge
latents noised in the same way. All this takes x0 for a picture, which it is at every step if the
student's way is straight, and only at the last one if it is curved: see `chords` in `trajectory`.

After each of the student's steps the proxy can move towards the student: IDA, SenseFlow, arXiv
2506.00523. Loss weights, rates and the ratio of updates are not published for SD3.5-Flash.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adversarial import Heads, judge_loss, student_loss
from .backbone import Backbone
from .optimize import Adam, restore, set_rates, update
from .student import Batch, Sample, StudentConfig, StudentTask, per_sample

RENOISE = ("shared", "levels", "random")


@dataclass(frozen=True)
class MatchConfig(StudentConfig):
    """The student's rate is small: normalised, its gradient is as long where little is wrong as
    where much is. The paper publishes none of these numbers.
    """

    renoise: str = "shared"
    proxy_warmup: int = 150  # steps in which only the proxy and the heads learn
    # s' of the last step, in its own s_i: the next level down, were the levels halved once more.
    # 0: heads alone judge that step.
    last_sigma: float = 0.5
    random_shift: float = 3.0  # of the uniform time that "random" draws s' from
    # Updates of the proxy for each of the student (TTUR). DMD2 and SwD take 5; here the student's
    # rate is a tenth of the proxy's, which then keeps up in two, at half the cost of a step.
    proxy_steps: int = 2
    proxy_rate: float = 2e-4  # ten times the student's: it is the student's to be followed
    # Share of itself that the proxy keeps after a step of the student. 1: off, since here the loss
    # falls without it; SenseFlow, whose critic takes 10 steps to the student's one, has 0.98 for
    # SD3.5, and says that only so its matching converges.
    ida: float = 1.0
    adversarial: float = 0.005  # weight of the heads in the student's loss; SwD 0.005 to 0.01
    head_rate: float = 1e-3  # small networks that start from nothing, again and again
    restart: float = 0.005  # chance a step that a head starts anew
    branch: tuple[float, float] = (0.0, 1.0)  # sigmas (above, up to) whose steps are trained
    batch: int = 32
    adam_rate: float = 2e-5

    def __post_init__(self):
        """Raises: ValueError for a renoise that there is not, or a branch without any step."""
        super().__post_init__()
        if self.renoise not in RENOISE:
            raise ValueError(f"renoise is {self.renoise!r}: expected one of {', '.join(RENOISE)}")
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

    def __init__(self, config: MatchConfig, backbone: Backbone, data: Batch, start=None, *rest):
        super().__init__(config, backbone, data, start, *rest)
        self.waits = config.proxy_warmup
        self.proxy = self.backbone.proxy(config)
        draw = torch.Generator().manual_seed(config.seed)
        self.heads = Heads(*self.backbone.features(), draw).to(self.device)
        self.proxy_optimizer = _build(self.adam, self.proxy, config.proxy_rate)
        self.head_optimizer = _build(self.adam, self.heads, config.head_rate)
        self.learn_proxy = self.processes.averaging(self.proxy, self._proxy_loss)
        self.learn_heads = self.processes.averaging(self.heads, self._judged)
        self.before = self.student  # draws the states that the steps of a branch begin with
        if config.steps()[0] > 0:
            self.before = backbone.student(config, start).requires_grad_(False)

    def step(self, index: int, progress: float) -> Tensor:
        """The loss; while the proxy learns alone, the proxy's."""
        alone = index < self.waits
        rate = min((index + 1) / self.config.warmup, 1.0)
        set_rates([self.proxy_optimizer, self.head_optimizer], rate)
        if alone:
            draw = self._draw(index)
            with torch.no_grad():
                self._make(index, self._sample(index, draw))
        else:
            loss = super().step(index, progress)
            self._follow()
        draw = torch.Generator().manual_seed((self.config.seed + 1) * 3_000_017 + index)
        for _ in range(self.config.proxy_steps):
            learned = self._teach_proxy(draw)
        if self.config.adversarial:
            self.heads.restart(self.config.restart, draw, self.head_optimizer)
        return self.processes.mean(learned) if alone else loss

    def _make(self, index: int, sample: Sample) -> tuple[int, Tensor, Tensor]:
        """The step that is trained, and x0 and v there; kept for the proxy, without gradient."""
        steps = self.config.steps()
        i = steps[index % len(steps)]
        x = self._walk(sample, i, self.before)
        v = self._velocity(self.student, x, self.sigmas[i], sample.told)
        x0 = x - self.sigmas[i] * v
        self.made = sample, i, x0.detach()
        return i, x0, v

    def _loss(self, index: int, sample: Sample, draw: torch.Generator) -> Tensor:
        i, x0, v = self._make(index, sample)
        noise, sigma = self._renoise(i, x0, v, draw)
        noisy = torch.lerp(x0, noise, per_sample(sigma, x0))
        loss = torch.zeros((), device=x0.device)
        if sigma.all():
            real, fake = self._compare(noisy.detach(), sigma, sample)
            loss = matching_loss(x0, real, fake)
            self.metrics["matching"] = loss.detach()
            # what is left to match, in how far the student is from the teacher's picture
            self.metrics["apart"] = (fake - real).abs().mean() / (x0.detach() - real).abs().mean()
        if self.config.adversarial:
            if self.config.renoise == "shared":
                noise = self._noise_like(x0, draw)
                noisy = torch.lerp(x0, noise, per_sample(sigma, x0))
            with self.backbone.tapped(self.proxy) as features:
                self._velocity(self.proxy, noisy, sigma, sample.told, frozen=True)
            fooled = student_loss(self.heads(features))
            self.metrics["adversarial"] = fooled.detach()
            loss = loss + self.config.adversarial * fooled
        return loss

    def _renoise(
        self, i: int, x0: Tensor, v: Tensor, draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Noise like x0, and its level (n,), at which step `i` is compared; see the file's head."""
        shared = self.config.renoise == "shared"
        noise = x0 + v if shared else self._noise_like(x0, draw)
        return noise, self._level(i, x0, draw)

    def _level(self, i: int, x0: Tensor, draw: torch.Generator) -> Tensor:
        if self.config.renoise != "random":
            following = self.sigmas[i + 1] or self.config.last_sigma * self.sigmas[i]
            return following.to(x0).expand(len(x0))
        shift, whole = self.config.random_shift, len(x0) * self.processes.count
        time = self.processes.own(torch.rand(whole, generator=draw))
        return (shift * time / (1 + (shift - 1) * time)).clamp(0.02, 0.98).to(x0)

    @torch.no_grad()
    def _compare(self, x: Tensor, sigma: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
        """x0 as teacher and proxy see it in x."""
        s, fake = per_sample(sigma, x), self._velocity(self.proxy, x, sigma, sample.told)
        return x - s * self._guided(x, sigma, sample), x - s * fake

    def _follow(self) -> None:
        """IDA: the proxy moves towards the student."""
        self.backbone.follow(self.proxy, self.student, 1 - self.config.ida)

    def _teach_proxy(self, draw: torch.Generator) -> Tensor:
        """One update of the proxy on the student's last latents, and one of the heads; the
        proxy's loss."""
        sample, i, x0 = self.made
        sigma, noise = self._level(i, x0, draw), self._noise_like(x0, draw)
        level = per_sample(sigma, x0)
        loss = self.learn_proxy(torch.lerp(x0, noise, level), sigma, noise - x0, sample)
        if self.config.adversarial:
            noisy = torch.lerp(sample.latents, self._noise_like(x0, draw), level)
            with torch.no_grad(), self.backbone.tapped(self.proxy) as real:
                self._velocity(self.proxy, noisy, sigma, sample.told)
            judged = self.learn_heads(real, [feature.detach() for feature in self.made_features])
            update(judged, [self.head_optimizer], self.config.clip)
            self.metrics["judge"] = judged.detach()
        update(loss, [self.proxy_optimizer], self.config.clip)
        self.metrics["proxy"] = loss.detach()
        return loss.detach()

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
        self.proxy.load_state_dict(state["proxy"])
        self.heads.load_state_dict(state["heads"])
        restore(
            [self.proxy_optimizer, self.head_optimizer],
            [state["proxy_optimizer"], state["head_optimizer"]],
        )


def _build(adam: Adam, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [{"params": learned, "peak": rate}]
    return adam(groups, lr=rate, betas=(0.5, 0.99), weight_decay=0.0)
