"""Text: one prompt node that says plainly what becomes of T5."""

from comfy_api.latest import io

from ..flow import T5_MODES
from ..host import sampling
from ..host.text import encode


class FewStepTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepTextEncode",
            display_name="FewStep Text Encode",
            category="model/conditioning",
            description="Encodes a prompt with whichever text encoders are loaded. For SD3-type "
            "models, says what becomes of T5: read the text, be left out, or be zeros.",
            search_aliases=["prompt", "text", "clip text encode", "t5", "encode text", "sd3"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, one or several."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. (word:1.2) weights, embedding:name and {a|b} work.",
                ),
                io.Combo.Input(
                    "t5",
                    options=list(T5_MODES),
                    default="auto",
                    tooltip="SD3-type models: encode = T5 reads the text; omit = no T5 tokens, 77 "
                    "CLIP tokens only; zeros77, zeros256 = so many zero tokens in T5's place, as "
                    "in training; auto = as the model's file says, else T5 if it is loaded.",
                ),
                io.String.Input(
                    "t5_text",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    optional=True,
                    advanced=True,
                    tooltip="A text of its own for T5, which likes whole sentences. Empty: the "
                    "same text. Counts only where T5 reads.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model whose file decides 'auto'.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt, encoded.")],
        )

    @classmethod
    def execute(cls, clip, text, t5, t5_text="", model=None) -> io.NodeOutput:
        preset = sampling.checkpoint_preset(model)
        return io.NodeOutput(encode(clip, text, t5_text, t5, preset))


NODES = [FewStepTextEncode]
