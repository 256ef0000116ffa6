"""Any flow MODEL that ComfyUI loads, as teacher, student and proxy of a distillation.

The teacher is the MODEL as it is patched; student and proxy are LoRAs, or whole differences, beside
the same frozen weights (see `adapters`), which may be a quantised file's (QLoRA, arXiv 2305.14314).
What it is told is CONDITIONING through the model's own `extra_conds`, its velocity is
(x − denoised) / sigma of the model's own `apply_model`; so whatever architecture the host knows can
be trained.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management as management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import psutil
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .adapters import LoRASet, block_lists, linear_layers, shard, switched
from .files import is_finite
from .sampling import require_flow

log = logging.getLogger(__name__)

Entry = list  # one of a CONDITIONING: [tensor, options]
SMALLEST_SIGMA = 1e-3  # below it, x − denoised is lost in rounding
KEPT = 10  # bytes of a learned number in the CPU's memory: copies to go back to and to give out
UNTAUGHT = {"control", "hooks", "area", "mask", "gligen", "start_percent", "end_percent"}


class Adapters:
    """A `distill.backbone.Backbone` on one MODEL. Prompts are numbers of `positive`'s entries; a
    `Text` is a list of what the network is told, an item for each sample.
    """

    hidden = ()  # all learn by AdamW

    def __init__(
        self,
        patcher,
        switch,
        layers,
        positive,
        negative,
        shape: tuple[int, ...],
        alone: bool = False,
    ):
        """`alone`: one call for each sample, as processes need that share the weights and call
        them equally often.
        """
        self.patcher, self.switch, self.layers, self.alone = patcher, switch, layers, alone
        self.model, self.device, self.shape = patcher.model, patcher.load_device, shape
        self.positive = [_checked(entry, "positive") for entry in positive]
        untold = [_checked(entry, "negative") for entry in negative or []]
        self.negative = self._tell(untold[0], "negative") if untold else None

    def student(self, config, start: dict[str, Tensor] | None) -> LoRASet:
        loras = LoRASet(self.layers, config.rank, config.seed)
        if start is not None:
            loras.take(start)
        return loras.to(self.device)

    def proxy(self, config) -> LoRASet:
        return LoRASet(self.layers, config.rank, config.seed).to(self.device)

    def read(self, prompts: Sequence[int], config, draw) -> tuple[list, list]:
        told = [self._tell(self.positive[n], "positive") for n in prompts]
        return told, [self.negative] * len(prompts)

    def join(self, first: list, second: list) -> list:
        return first + second

    def velocity(
        self, network: LoRASet | None, x: Tensor, sigma: Tensor, text: list, frozen: bool = False
    ) -> Tensor:
        """Prompts that the model can be told at once share a call.

        Raises: the host's InterruptProcessingException when the user stops it.
        """
        management.throw_exception_if_processing_interrupted()
        sigma = sigma.clamp(min=SMALLEST_SIGMA)
        groups = [[place] for place in range(len(text))] if self.alone else _groups(text)
        with self.switch.set(network, frozen):
            made = [
                self._apply(x[group], sigma[group], [text[i] for i in group]) for group in groups
            ]
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return torch.cat(made)[order.to(x.device)]

    def _apply(self, x: Tensor, sigma: Tensor, told: list) -> Tensor:
        options = dict(self.patcher.model_options.get("transformer_options", {}))
        options |= {"cond_or_uncond": [0] * len(x), "uuids": [], "sigmas": sigma}
        options["optimized_attention_override"] = _attention
        c = comfy.samplers.cond_cat(told, device=self.device)
        c["transformer_options"] = options
        wrapper = self.patcher.model_options.get("model_function_wrapper")
        try:
            if wrapper is None:
                denoised = self.model.apply_model(x, sigma, **c)
            else:
                given = {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0] * len(x)}
                denoised = wrapper(self.model.apply_model, given)
        except AssertionError as error:  # as of SD3's table of positions
            size = "x".join(map(str, x.shape[1:]))
            raise ValueError(
                f"The model takes no latents of size {size}: give pictures of another size, "
                f"smaller ones if in doubt ({error})."
            ) from error
        return (x - denoised).float() / sigma.view(-1, *[1] * (x.ndim - 1))

    @contextmanager
    def tapped(self, network: nn.Module) -> Iterator[list[Tensor]]:
        """All tokens, of picture and prompt, that each block gives; of the longest list of them.
        Where the prompt's are narrower (Mochi), only the picture's.
        """
        features: list[Tensor] = []

        def keep(_module, _args, out):
            parts = [out] if torch.is_tensor(out) else [part for part in out if part is not None]
            width = max(part.shape[-1] for part in parts)
            parts = [part for part in parts if part.shape[-1] == width]
            features.append(torch.cat([part.float().flatten(1, -2) for part in parts], 1))

        chosen = max(block_lists(self.model), key=len)
        hooks = [block.register_forward_hook(keep) for block in chosen]
        try:
            yield features
        finally:
            for hook in hooks:
                hook.remove()

    def features(self) -> tuple[int, int]:
        """Found by one call of the teacher."""
        x = torch.zeros(1, *self.shape, device=self.device)
        with torch.no_grad(), self.tapped(None) as features:
            told = [self._tell(self.positive[0], "positive")]
            self.velocity(None, x, torch.ones(1, device=self.device), told)
        return len(features), features[0].shape[-1]

    @torch.no_grad()
    def follow(self, proxy: LoRASet, student: LoRASet, share: float) -> None:
        """Of a LoRA's factors, not of their products, which low rank cannot average."""
        for value, goal in zip(proxy.parameters(), student.parameters(), strict=True):
            value.lerp_(goal, share)

    def weights(self, student: LoRASet) -> dict[str, Tensor]:
        """The LoRA, as in its file, in float32."""
        return student.state()

    def _tell(self, entry: Entry, kind: str) -> dict:
        """What the network is told of a CONDITIONING's entry: {name: the host's COND}.

        Raises: ValueError for an entry without something that the model wants.
        """
        noise = torch.zeros(1, *self.shape, device=self.device)
        conds = comfy.sampler_helpers.convert_cond([entry])
        try:
            with torch.no_grad():
                made = comfy.samplers.encode_model_conds(
                    self.model.extra_conds,
                    conds,
                    noise,
                    self.device,
                    kind,
                    latent_image=noise,
                    latent_shapes=[noise.shape],
                )[0]["model_conds"]
        except KeyError as error:
            raise ValueError(
                f"The {kind} CONDITIONING has no {error.args[0]}, which the model wants: encode it "
                "with the model's own text encoders."
            ) from error
        return {name: cond.process_cond(batch_size=1, area=None) for name, cond in made.items()}


def _attention(_chosen, *args, **kwargs) -> Tensor:
    """torch's, which has a backward; what the host or a pack chose may be a kernel without one."""
    return attention_pytorch(*args, **kwargs)


@contextmanager
def training(
    model,
    positive,
    negative,
    shape: tuple[int, ...],
    rank: int,
    batch: int,
    each: int,
    recompute: bool = True,
    dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
) -> Iterator[Adapters]:
    """A MODEL ready to learn LoRAs; afterwards it is as it was, unless it was sharded.

    positive: CONDITIONING of one entry or more; negative: of one, or None. shape: of a latent,
    without the batch. rank: 0 for whole weights. each: bytes that a learned number takes, its
    gradient, optimizer's moments and copies in other networks with it.
    dtype: of activations; None: the MODEL's own, but bfloat16 for float16, whose gradients vanish.
    mesh: the processes that the MODEL's weights are sharded over; None: each has all of them.
    Everything that learns must be made inside. Raises: ValueError for a model that is no flow
    model, and where memory would not do.
    """
    require_flow(model)
    with torch.inference_mode(False), torch.enable_grad():
        patcher = model.clone()
        if dtype is None and patcher.model.get_dtype_inference() == torch.float16:
            dtype = torch.bfloat16
        if dtype is not None:
            patcher.set_model_compute_dtype(dtype)
        numbers = learned_numbers(patcher.model, rank)
        needed = numbers * each + memory_needed(patcher.model, shape, batch, recompute)
        if mesh is None:
            management.load_models_gpu([patcher], memory_required=needed, force_full_load=True)
        else:
            management.unload_all_models()
            patcher.patch_model(device_to=patcher.offload_device)
            shard(patcher.model, mesh, patcher.load_device)
        if management.is_device_cpu(patcher.load_device):
            needed += numbers * KEPT
        else:
            check_memory(numbers * KEPT, torch.device("cpu"))
        check_memory(needed, patcher.load_device)
        was, management.in_training = management.in_training, True
        try:
            patcher.pre_run()
            with switched(patcher.model, recompute) as (switch, layers):
                given = (positive, negative, shape)
                yield Adapters(patcher, switch, layers, *given, alone=mesh is not None)
        finally:
            management.in_training = was
            patcher.cleanup()


def joined(model, latents: list[dict]) -> Tensor:
    """LATENTs as one batch (m, channels, …); of empty ones, which only say the size, a single one.

    Raises: ValueError where their sizes differ, some are empty, or they are none of the MODEL's.
    """
    samples, form = [], model.get_model_object("latent_format")
    for one in latents:
        ratios = (one.get("downscale_ratio_spacial"), one.get("downscale_ratio_temporal"))
        samples.append(comfy.sample.fix_empty_latent_channels(model, one["samples"], *ratios))
    sizes = sorted({"x".join(map(str, one.shape[1:])) for one in samples})
    if len(sizes) > 1:
        raise ValueError(f"The latents are of several sizes, {', '.join(sizes)}: give one a run.")
    channels, ndim = form.latent_channels, form.latent_dimensions + 2
    if samples[0].ndim != ndim or samples[0].shape[1] != channels:
        raise ValueError(
            f"The latents are of size {sizes[0]}, the model's have {channels} channels in "
            f"{ndim - 1} dimensions: encode the pictures with the model's own VAE."
        )
    if not all(map(is_finite, samples)):
        raise ValueError("The latents hold NaN or infinity: look at the pictures and their VAE.")
    drawn = torch.cat(samples).flatten(1).any(1)
    if not drawn.any():
        return samples[0][:1]
    if not drawn.all():
        raise ValueError("Some latents are pictures and some are empty: give either, not both.")
    return torch.cat(samples)


def learned_numbers(model, rank: int) -> int:
    """In a LoRA of that rank; of rank 0, in the weights that learn."""
    shapes = [layer.weight.shape for layer in linear_layers(model).values()]
    return sum(min(rank, *s) * sum(s) if rank else math.prod(s) for s in shapes)


def memory_needed(model, shape: tuple[int, ...], batch: int, recompute: bool) -> int:
    """Bytes that the backward keeps, estimated.

    The host's estimate of what one call takes stands for one block's share; without recomputing,
    every block has one.
    """
    call = model.memory_required([2 * batch, *shape])
    kept = 2 if recompute else 1 + sum(map(len, block_lists(model)))
    return int(call * kept)


def check_memory(needed: int, device: torch.device) -> None:
    """Say what training will take. Raises: ValueError where that is not free."""
    free = management.get_free_memory(device)
    if device.type == "cpu":
        free = min(free, _left_of_limit())
    log.info(
        "Training takes about %.2f GB of %s beside the model; %.2f are free.",
        needed / 1e9,
        device,
        free / 1e9,
    )
    if needed > free:
        raise ValueError(
            f"Training takes about {needed / 1e9:.2f} GB beside the model, and {device} has "
            f"{free / 1e9:.2f} free: take a smaller latent or batch, a LoRA of a lower rank, or a "
            "model quantised to fewer bits."
        )


def _left_of_limit() -> float:
    """Bytes of address space that a limit on this process (`ulimit -v`) leaves."""
    try:
        import resource  # not on Windows
    except ImportError:
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return max(0, limit - psutil.Process().memory_info().vms)


def _checked(entry: Entry, kind: str) -> Entry:
    """A CONDITIONING's entry that autograd can keep. Raises: ValueError for what only concerns a
    part of the picture or of the sampling, and for NaN.
    """
    if odd := sorted(UNTAUGHT & set(entry[1])):
        raise ValueError(
            f"The {kind} CONDITIONING carries {', '.join(odd)}, which a few-step LoRA does not "
            "learn: connect the text encoder's output as it is."
        )
    if len(entry[0]) > 1:
        raise ValueError(
            f"The {kind} CONDITIONING holds {len(entry[0])} prompts in one entry: encode each by "
            "itself, and connect them all."
        )
    for value in (entry[0], entry[1].get("pooled_output")):
        if torch.is_tensor(value) and not is_finite(value):
            raise ValueError(
                f"The {kind} CONDITIONING holds NaN or infinity: get another text encoder, or have "
                "it compute in another type."
            )
    return _plain(entry)


def _groups(text: list[dict]) -> list[list[int]]:
    """Places of the samples that can share a call."""
    groups: list[list[int]] = []
    for place, told in enumerate(text):
        for group in groups:
            if _alike(text[group[0]], told):
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def _alike(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        cond.size() == other[name].size() and cond.can_concat(other[name])
        for name, cond in one.items()
    )


def _plain(value):
    """A copy of nested values, its tensors none that were made in inference mode (see autograd)."""
    if torch.is_tensor(value):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(part) for part in value)
    return value
