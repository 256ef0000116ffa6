"""Quantising: a MODEL into a GGUF file, what its inputs tell of it, what a file holds and takes,
and what quantising did to the pictures."""

import os

from comfy_api.latest import io, ui

from ..host import comparing, folders, importance, quantizing, sampling
from ..host.preflight import preflight
from ..quant import writable_types
from ..quant.budget import parse_budget
from ..quant.effort import EFFORTS
from ..quant.recipes import RECIPES
from .sampling import PresetNode

NONE = "none"


class FewStepQuantize(PresetNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepQuantize",
            display_name="FewStep Quantize",
            category="model/quantization",
            description="Writes a MODEL, its LoRAs and merges baked in, as a GGUF file, and shows "
            "what that cost: the error of each tensor against the MODEL.",
            search_aliases=["gguf", "quantise", "save model", "export", "q4_k", "compress", "bake"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to write, as it is patched here."),
                io.Combo.Input(
                    "recipe",
                    options=recipes(),
                    default="flash-6",
                    tooltip="Which tensor gets which type: a mix (flash-… or one of ggml's), or "
                    "one type for all ordinary matrices. The help page lists them.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/fewstep",
                    tooltip="File below ComfyUI's output folder; recipe and number are added. In "
                    "diffusion_models it shows up in the loaders' lists (press R).",
                ),
                io.String.Input(
                    "budget",
                    default="",
                    optional=True,
                    advanced=True,
                    placeholder="1.8GB or 4.5bpw",
                    tooltip="A size, as 1.8GB, or bits a weight, as 4.5bpw. If given, recipe does "
                    "not count: errors are measured, and the best mix that fits is taken.",
                ),
                io.Combo.Input(
                    "importance",
                    options=[NONE, *folders.importance_names()],
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="How much each input of a weight counts: a file of FewStep Importance "
                    "or an imatrix GGUF, from output/importance or models/importance.",
                ),
                cls.preset_input(optional=True, advanced=True),
                io.Combo.Input(
                    "effort",
                    options=list(EFFORTS),
                    default=EFFORTS[0],
                    optional=True,
                    advanced=True,
                    tooltip="'ggml' writes the bytes that ggml writes; 'high' searches longer, "
                    "for less error of Q3_K to Q6_K in the same format.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="file", tooltip="Its name in the output folder."),
                io.String.Output(display_name="report", tooltip="Types, sizes and errors."),
                io.Image.Output(display_name="plot", tooltip="The error of each tensor."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, importance=NONE, preset=None, **kwargs):
        """Run again when the importance file or the chosen row of the user's presets changed."""
        changed = None
        if importance not in (None, NONE):
            changed = os.path.getmtime(folders.importance_path(importance))
        return repr((changed, super().fingerprint_inputs(preset)))

    @classmethod
    def execute(
        cls,
        model,
        recipe,
        filename_prefix,
        budget="",
        importance=NONE,
        preset=sampling.AUTO,
        effort=EFFORTS[0],
    ) -> io.NodeOutput:
        if budget := budget.strip():
            parse_budget(budget)  # a part of the file's name: nothing that leads elsewhere
        path = quantizing.output_file(filename_prefix, f"-{budget or recipe}")
        report = quantizing.quantize_model(
            model,
            path,
            recipe,
            budget,
            None if importance == NONE else folders.importance_path(importance),
            None if preset == sampling.AUTO else sampling.named_preset(preset),
            effort,
        )
        name, plot = quantizing.in_output(path), quantizing.plot(report)
        text = report.text(summary_first=True)
        shown = ui.PreviewImage(plot, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(name, text, plot, ui=shown)


class FewStepImportance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepImportance",
            display_name="FewStep Importance",
            category="model/quantization",
            description="Watches a MODEL while it draws, and notes how large each weight's inputs "
            "are. Every sampling adds to an importance file, which FewStep Quantize and llama.cpp "
            "read.",
            search_aliases=["imatrix", "calibration", "gguf", "quantize", "importance matrix"],
            inputs=[
                io.Model.Input("model", tooltip="The model to watch, not quantised if possible."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{folders.IMPORTANCE}/fewstep",
                    tooltip="File below ComfyUI's output folder; a number is added. In importance "
                    "it shows up in FewStep Quantize (press R).",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, watched: sample with it.")],
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        return io.NodeOutput(importance.watch(model, filename_prefix))


class FewStepInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepInspect",
            display_name="FewStep Inspect",
            category="model/quantization",
            description="Tells before loading what a model file holds: types, size, few-step "
            "schedule, metadata, the memory it will take on this machine, and whether it fits.",
            search_aliases=["gguf", "preflight", "metadata", "vram", "memory", "model info"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.any_model_names(),
                    tooltip="A diffusion model, text encoder or VAE of the loaders' lists.",
                ),
                side_input("width"),
                side_input("height"),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Pictures drawn at once, 1 to 4096.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The report as text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        """Run again when the file has changed."""
        return os.path.getmtime(folders.any_model_path(file))

    @classmethod
    def execute(cls, file, width, height, batch_size=1) -> io.NodeOutput:
        text = preflight(folders.any_model_path(file), width, height, batch_size)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class FewStepCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepCompare",
            display_name="FewStep Compare",
            category="model/quantization",
            description="Two latents drawn from the same seed, by a model and by what was made of "
            "it: decodes both, lays them side by side and tells how close they are (PSNR).",
            search_aliases=["psnr", "difference", "side by side", "quality", "quantize"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("original", tooltip="Drawn by the original model."),
                io.Latent.Input("other", tooltip="Drawn by the other one, all else being equal."),
                io.Vae.Input("vae", tooltip="Decodes both."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="side by side", tooltip="The original left, the other right."
                ),
                io.String.Output(display_name="report", tooltip="PSNR of latents and pictures."),
            ],
        )

    @classmethod
    def execute(cls, original, other, vae) -> io.NodeOutput:
        found = comparing.compare(original, other, vae)
        shown = ui.PreviewImage(found.picture, cls=cls).as_dict()
        shown |= ui.PreviewText(found.text()).as_dict()
        return io.NodeOutput(found.picture, found.text(), ui=shown)


def side_input(name):
    return io.Int.Input(
        name,
        default=1024,
        min=16,
        max=16384,
        step=8,
        tooltip=f"The picture's {name} in pixels, 16 to 16384, for the memory that a step takes.",
    )


def recipes():
    """Mixes first, then the types that none of them is named after."""
    return list(dict.fromkeys([*RECIPES, *(qtype.name for qtype in writable_types())]))


NODES = [FewStepQuantize, FewStepImportance, FewStepInspect, FewStepCompare]
