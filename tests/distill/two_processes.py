"""Run twice at once by `test_several`: says the losses of one process, and of two together."""

import json
import sys
from pathlib import Path

import run

run.load_pack()

import torch  # noqa: E402
from fewstep.tests import in_process  # noqa: E402

in_process.prepare()
torch.set_num_threads(1)

import comfy.sd  # noqa: E402
from fewstep.distill.few_step_lora import METHODS, Plan, build, steps  # noqa: E402
from fewstep.distill.several import ONE, processes  # noqa: E402
from fewstep.host.training import training  # noqa: E402
from fewstep.tests.host import toys  # noqa: E402

SHAPE = (16, 4, 4)


def prompt(seed):
    draw = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, 5 + seed, 4096, generator=draw)
    return [cond, {"pooled_output": torch.randn(1, 2048, generator=draw)}]


def main(folder: Path) -> None:
    together, model = processes(cpu=True), comfy.sd.load_diffusion_model_state_dict(toys.mmdit(1))
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        plan = Plan(
            (1.0, 0.5, 0.0), method, steps=6, rank=2, batch=4, guidance=2.0, rate=1e-3,
            teacher_steps=2, trajectories=2,
        )  # fmt: skip
        prompts = [prompt(1), prompt(2)]
        with training(model, prompts, [prompt(3)], SHAPE, plan.rank, plan.batch) as backbone:
            for group in (ONE, together):
                states = folder / f"{together.number}-{group.count}"
                task = build(plan, backbone, latents, states, processes=group)
                losses = list(steps(task, plan.steps))
                weights = sum(
                    value.double().abs().sum().item() for value in task.weights().values()
                )
                row = {"method": method, "processes": group.count, "losses": losses}
                path = folder / f"{method}-{group.count}-{together.number}.json"
                path.write_text(json.dumps(row | {"weights": weights}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
