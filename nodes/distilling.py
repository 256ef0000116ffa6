"""Distilling: a MODEL of many steps, and prompts, into a LoRA that draws in few."""

from comfy_api.latest import io

from ..distill import few_step_lora
from ..distill.optimize import ADAMS
from ..host.learned import lora_model
from ..host.training import joined


class FewStepDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepDistill",
            display_name="FewStep Distill",
            category="model/training",
            description="Trains a LoRA with which a flow MODEL draws in a few steps what it draws "
            "in many, with guidance. The MODEL's weights stay as they are, and may be quantised.",
            search_aliases=["train lora", "distillation", "turbo", "lightning", "lcm", "dmd"],
            is_experimental=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher: any flow model, also from GGUF."),
                io.Conditioning.Input(
                    "positive", tooltip="Prompts to learn from: one, or a list of them."
                ),
                io.Latent.Input(
                    "latents",
                    tooltip="Pictures' latents, one for each prompt; or an empty latent, which "
                    "only says the size: all is then learned from what the teacher draws.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The noise levels that the student will draw with, from 1 to 0: "
                    "connect FewStep Schedule.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(few_step_lora.METHODS),
                    default=few_step_lora.METHODS[0],
                    tooltip="'trajectory' follows the teacher's path (stage 1, begin here); "
                    "'matching' sharpens what that gave (stage 2, connect its lora).",
                ),
                io.Int.Input(
                    "steps",
                    default=400,
                    min=1,
                    max=100_000,
                    tooltip="Updates of the LoRA, 1 to 100000. 400 to 2000 are usual.",
                ),
                io.Float.Input(
                    "guidance",
                    default=3.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The teacher's CFG, 1 to 30, which the student learns to do without. "
                    "Other than 1 it needs a negative prompt.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="Of the LoRA, 1 to 512; 0 learns whole weights, in much more memory.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="Of AdamW, 0.0000001 to 1, after a short warm-up and before a linear "
                    "fall to zero.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Of noise and LoRA: the same seed learns the same.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the teacher's guidance leads away from.",
                ),
                io.Custom("LORA_MODEL").Input(
                    "lora", optional=True, tooltip="A LoRA of the same rank to go on from."
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    advanced=True,
                    tooltip="Samples in an update, 1 to 1024.",
                ),
                io.Int.Input(
                    "teacher_steps",
                    default=24,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="Steps of the teacher from noise to picture, 1 to 1000.",
                ),
                io.Int.Input(
                    "trajectories",
                    default=32,
                    min=1,
                    max=100_000,
                    optional=True,
                    advanced=True,
                    tooltip="Batches of the teacher's paths, 1 to 100000. Each is computed once "
                    "and then seen again.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(ADAMS),
                    default=ADAMS[0],
                    optional=True,
                    advanced=True,
                    tooltip="adamw is torch's. The 8-bit ones take a quarter of its memory and "
                    "need the package bitsandbytes.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Compute blocks twice instead of keeping what they computed: a third "
                    "more time for a fraction of the memory.",
                ),
                io.Boolean.Input(
                    "straight",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="trajectory: learn a straight way to where the teacher's path ends, "
                    "not the path itself. For 'matching', and for fewer steps than sigmas.",
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    display_name="lora", tooltip="For Load LoRA Model and Save LoRA Weights."
                ),
                io.Custom("LOSS_MAP").Output(
                    display_name="loss_map", tooltip="For Plot Loss Graph."
                ),
                io.Int.Output(display_name="steps", tooltip="Updates that were made."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latents, sigmas, method, steps, guidance, rank, learning_rate, seed,
        negative=(None,), lora=(None,), batch_size=(1,), teacher_steps=(24,), trajectories=(32,),
        optimizer=("adamw",), gradient_checkpointing=(True,), straight=(False,),
    ) -> io.NodeOutput:  # fmt: skip
        plan = few_step_lora.Plan(
            tuple(sigmas[0].tolist()), method[0], steps[0], rank[0], learning_rate[0], guidance[0],
            batch_size[0], teacher_steps[0], trajectories[0], gradient_checkpointing[0], seed[0],
            optimizer[0], chords=(1.0, 0.0) if straight[0] else (),
        )  # fmt: skip
        prompts = [entry for conditioning in positive for entry in conditioning]
        learned, losses = few_step_lora.distil(
            model[0], prompts, negative[0], joined(model[0], latents), plan, lora[0]
        )
        return io.NodeOutput(lora_model(learned), {"loss": losses}, plan.steps)


NODES = [FewStepDistill]
