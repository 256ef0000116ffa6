"""Loaders: GGUF (every type) and safetensors files into the host's MODEL, CLIP and VAE."""

import folder_paths
from comfy_api.latest import io

from ..host import folders, loading, residency, runtime

NONE = "none"


class FewStepLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepLoadDiffusionModel",
            display_name="FewStep Load Diffusion Model",
            category="model/loaders",
            description="Loads a diffusion model from a GGUF file (any type, any architecture that "
            "ComfyUI knows) or a safetensors file. Weights stay quantised in memory; LoRA nodes "
            "work as on any model. The checkpoint's own few-step schedule travels with the MODEL.",
            search_aliases=["gguf", "unet loader", "load unet", "quantized", "distilled", "flash"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names("diffusion_models"),
                    tooltip="A file from models/diffusion_models (or models/unet): .gguf or "
                    ".safetensors. fewstep-demo.gguf comes with this pack.",
                ),
                io.Combo.Input(
                    "memory",
                    options=residency.CHOICES,
                    default="low",
                    optional=True,
                    advanced=True,
                    tooltip="How much unpacked GGUF weights may stay in memory, beside the file's "
                    "own size, so that later steps need not unpack them again. low: none; auto: "
                    "what is free.",
                ),
                io.Combo.Input(
                    "runtime",
                    options=runtime.CHOICES,
                    default=runtime.EXACT,
                    optional=True,
                    advanced=True,
                    tooltip="Turns a GGUF file's weights while loading into a format that the "
                    "processor itself multiplies: faster, at a small error, told in the log. "
                    f"This machine has {runtime.here()}; asked for another, weights stay exact.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A stock MODEL.")],
        )

    @classmethod
    def execute(cls, model_name, memory="low", runtime="exact") -> io.NodeOutput:
        path = folders.model_path("diffusion_models", model_name)
        return io.NodeOutput(loading.load_diffusion_model(path, memory, runtime))


class FewStepLoadTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = [NONE, *folders.model_names("text_encoders")]
        which = "A file from models/text_encoders (or models/clip): .gguf or .safetensors. "
        return io.Schema(
            node_id="FewStepLoadTextEncoders",
            display_name="FewStep Load Text Encoders",
            category="model/loaders",
            description="Loads one to four text encoders as one CLIP, GGUF and safetensors mixed, "
            "in any order: each file is recognised by its content. Leave slots at 'none', for "
            "instance the T5 of SD3.5.",
            search_aliases=["gguf", "clip loader", "dual clip", "triple clip", "t5", "load clip"],
            inputs=[
                io.Combo.Input(
                    f"encoder_{n}",
                    options=files,
                    default=files[min(1, len(files) - 1)] if n == 1 else NONE,
                    optional=n > 1,
                    tooltip=which + "The order does not matter.",
                )
                for n in range(1, 5)
            ]
            + [
                io.Combo.Input(
                    "type",
                    options=loading.CLIP_TYPES,
                    default="sd3",
                    tooltip="The family of the diffusion model, as in the stock CLIP loaders. "
                    "SD3 and SD3.5: clip_l, clip_g and t5xxl, each optional.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="Where the encoders run. 'cpu' leaves the GPU's memory to the "
                    "diffusion model.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="A stock CLIP.")],
        )

    @classmethod
    def execute(
        cls, encoder_1, type, encoder_2=NONE, encoder_3=NONE, encoder_4=NONE, device="default"
    ) -> io.NodeOutput:
        chosen = [n for n in (encoder_1, encoder_2, encoder_3, encoder_4) if n != NONE]
        if not chosen:
            raise ValueError("All four encoders are 'none': choose at least one file.")
        paths = [folders.model_path("text_encoders", name) for name in chosen]
        embeddings = folder_paths.get_folder_paths("embeddings")
        clip = loading.load_text_encoders(paths, type, device == "cpu", embeddings)
        return io.NodeOutput(clip)


class FewStepLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepLoadVAE",
            display_name="FewStep Load VAE",
            category="model/loaders",
            description="Loads a VAE from a GGUF or safetensors file.",
            search_aliases=["gguf", "vae loader", "autoencoder", "taesd"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folders.model_names("vae"),
                    tooltip="A file from models/vae: .gguf or .safetensors. fewstep-demo-vae.gguf "
                    "comes with this pack.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="A stock VAE.")],
        )

    @classmethod
    def execute(cls, vae_name) -> io.NodeOutput:
        return io.NodeOutput(loading.load_vae(folders.model_path("vae", vae_name)))


NODES = [FewStepLoadDiffusionModel, FewStepLoadTextEncoders, FewStepLoadVAE]
