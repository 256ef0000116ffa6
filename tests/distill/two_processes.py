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
from fewstep.distill.few_step_lora import METHODS, Learned, Plan, build  # noqa: E402
from fewstep.distill.several import ONE, processes  # noqa: E402
from fewstep.host.adapters import block_lists  # noqa: E402
from fewstep.host.training import training  # noqa: E402
from fewstep.tests.host import toys  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

SHAPE = (16, 4, 4)


def prompt(seed):
    draw = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, 5 + seed, 4096, generator=draw)
    return [cond, {"pooled_output": torch.randn(1, 2048, generator=draw)}]


def main(folder: Path) -> None:
    together = processes(cpu=True)
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    prompts, negative = [prompt(1), prompt(2)], [prompt(3)]
    for method in METHODS:
        plan = Plan(
            (1.0, 0.5, 0.0), method, steps=6, rank=2, batch=4, guidance=2.0, rate=1e-3,
            teacher_steps=2, trajectories=2,
        )  # fmt: skip
        for group in (ONE, together):
            model = comfy.sd.load_diffusion_model_state_dict(toys.mmdit(1))
            with training(model, prompts, negative, SHAPE, **plan.training(group)) as backbone:
                states = folder / f"{together.number}-{group.count}"
                task = build(plan, backbone, latents, states, processes=group)
                learned = Learned(task)
                assert list(learned.steps(plan.steps))[-1] == plan.steps
                task.draw()  # without gradient
                row = {
                    "method": method,
                    "processes": group.count,
                    "losses": learned.losses,
                    "weights": size(task.weights().values()),
                    "kept": kept(backbone.model),
                }
            path = folder / f"{method}-{group.count}-{together.number}.json"
            path.write_text(json.dumps(row))


def size(weights) -> float:
    return sum(value.double().abs().sum().item() for value in weights)


def kept(model) -> int:
    """Bytes of the blocks' weights that lie in this process."""
    blocks = (block for members in block_lists(model) for block in members)
    weights = (weight for block in blocks for weight in block.parameters())
    return sum((w.to_local() if isinstance(w, DTensor) else w).nbytes for w in weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
