"""Sampling: a schedule (SIGMAS), a step rule (SAMPLER), or the whole thing in one box."""

from comfy_api.latest import io

from ..flow import RULES, parse_sigmas, resample
from ..host import sampling

SEED_LIMIT = 0xFFFFFFFFFFFFFFFF


class PresetNode(io.ComfyNode):
    """What the three nodes below share: the input `preset`, with the user's own rows."""

    @classmethod
    def preset_input(cls, **options):
        return io.Combo.Input(
            "preset",
            options=sampling.preset_names(),
            default=sampling.AUTO,
            tooltip="How the checkpoint was distilled. 'auto' reads it from the model's file; "
            f"your own rows go into ComfyUI's user/{sampling.PRESETS_FILE}.",
            **options,
        )

    @classmethod
    def validate_inputs(cls, preset=None):
        """The host's own check of the list would hide a fault in the user's file."""
        if preset not in (None, sampling.AUTO):  # None: linked from another node, or left out
            try:
                sampling.named_preset(preset)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, preset=None, **kwargs):
        """Run again when the chosen row of the user's file has changed."""
        return None if preset in (None, sampling.AUTO) else repr(sampling.named_preset(preset))


class FewStepSchedule(PresetNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSchedule",
            display_name="FewStep Schedule",
            category="model/sampling/schedulers",
            description="The noise levels of a few-step model: from its own file, from a preset, "
            "or typed. Feeds SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["sigmas", "scheduler", "timesteps", "turbo", "lightning", "flash"],
            inputs=[
                cls.preset_input(),
                steps_input(),
                denoise_input(),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Timestep shift, 0 to 100: higher spends more steps on the layout. "
                    "0 is the preset's own; distilled models want that.",
                ),
                io.String.Input(
                    "sigmas",
                    default="",
                    optional=True,
                    advanced=True,
                    placeholder="1, 0.9, 0.75, 0.5, 0",
                    tooltip="Noise levels of your own, falling from at most 1 to 0. If given, "
                    "preset, steps and shift do not count.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model whose file holds the schedule; needed for 'auto'.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Needed only where the picture's size decides the schedule (FLUX.2).",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="steps+1 noise levels that end in 0.")],
        )

    @classmethod
    def execute(
        cls, preset, steps, denoise, shift, sigmas="", model=None, latent=None
    ) -> io.NodeOutput:
        sampling.require_flow(model)
        if sigmas.strip():
            typed = parse_sigmas(sigmas)
            return io.NodeOutput(resample(typed, len(typed) - 1, denoise=denoise))
        chosen = sampling.choose_preset(preset, model)
        return io.NodeOutput(sampling.schedule(chosen, latent, steps, shift, denoise))


class FewStepSampler(PresetNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSampler",
            display_name="FewStep Sampler",
            category="model/sampling/samplers",
            description="The step rule of a few-step model. euler follows the model's direction; "
            "renoise jumps to the clean picture and adds fresh noise (LCM, SwD, SenseFlow).",
            search_aliases=["sampler", "euler", "lcm", "renoise", "swd", "senseflow"],
            inputs=[
                rule_input(),
                cls.preset_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model whose file names the rule; needed for 'auto'.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, rule, preset, model=None) -> io.NodeOutput:
        sampling.require_flow(model)
        if preset == sampling.AUTO and rule != sampling.AUTO_RULE:
            chosen = sampling.checkpoint_preset(model)  # nothing to look up, if it has none
        else:
            chosen = sampling.choose_preset(preset, model)
        return io.NodeOutput(sampling.make_sampler(rule, chosen))


class FewStepSample(PresetNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSample",
            display_name="FewStep Sample",
            category="model/sampling",
            description="Draws with a few-step model in one box: schedule, step rule and guidance "
            "come from the model's file, or from a preset. At CFG 1 each step runs the model once.",
            search_aliases=["ksampler", "sampler", "generate", "txt2img", "img2img", "turbo"],
            inputs=[
                io.Model.Input("model", tooltip="A few-step flow model."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Latent.Input(
                    "latent", tooltip="An empty latent of the wanted size, or a picture's latent."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEED_LIMIT,
                    control_after_generate=True,
                    tooltip="Where the noise starts: the same seed gives the same picture.",
                ),
                steps_input(),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance, 1 to 30. 0 is the checkpoint's own, mostly 1: no negative "
                    "prompt, half the time. Other values need a negative prompt.",
                ),
                denoise_input(),
                cls.preset_input(advanced=True),
                rule_input(advanced=True),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid; counts only if cfg is not 1."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The drawn latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, seed, steps, cfg, denoise, preset, rule, negative=None
    ) -> io.NodeOutput:
        sampling.require_flow(model)
        chosen = sampling.choose_preset(preset, model)
        sigmas = sampling.schedule(chosen, latent, steps, denoise=denoise)
        sampler = sampling.make_sampler(rule, chosen)
        cfg = cfg or chosen.cfg
        drawn = sampling.sample(model, positive, negative, latent, seed, cfg, sampler, sigmas)
        return io.NodeOutput(drawn)


def steps_input():
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=100,
        tooltip="Number of steps, 1 to 100. 0 is the checkpoint's own. Others work, but the "
        "checkpoint may not have been trained for them; the log says so.",
    )


def denoise_input():
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How much of the latent to redraw, 0 to 1. 1 draws anew; lower keeps more of the "
        "picture given, in the same number of steps; 0 changes nothing.",
    )


def rule_input(**options):
    return io.Combo.Input(
        "rule",
        options=[sampling.AUTO_RULE, *RULES],
        default=sampling.AUTO_RULE,
        tooltip="How to step from one noise level to the next. 'auto' is the preset's rule.",
        **options,
    )


NODES = [FewStepSchedule, FewStepSampler, FewStepSample]
