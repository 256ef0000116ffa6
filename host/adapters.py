"""Several sets of what is learned beside one frozen network, switched from call to call.

Teacher, student and proxy of a distillation are one network three times. Here its weights, which
may be quantised, lie in memory once: `y = f(x) + up(down(x))`, where f is the host's own layer and
the factors are those of the set that is switched on; with none, the network is as it was loaded.
In place of a LoRA's factors there may be a whole matrix and bias: all of the layer is then trained.
ComfyUI's bypass mechanism (`comfy.weight_adapter.bypass`) puts this in the layers' place and takes
it away again; a LoRA's file has the names that its LoRA loaders know.

A layer's own weight gets no gradient, so its backward needs only the weight, which is unpacked anew
there: kernels that autograd knows nothing of may compute the forward, and no input is kept for it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.base import WeightAdapterTrainBase
from comfy.weight_adapter.bypass import BypassInjectionManager
from comfy_kitchen.backends import eager
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from .files import is_finite
from .recomputing import recomputing

ROOT = "diffusion_model"  # where a MODEL keeps its network, and how LoRA files' names begin


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The network's layers that a LoRA can learn, by name, of the host's BaseModel."""
    return {
        f"{ROOT}.{name}": module
        for name, module in model.get_submodule(ROOT).named_modules()
        if isinstance(module, comfy.ops.CastWeightBiasOp)
        and not isinstance(module, nn.Embedding)
        and module.weight is not None
        and module.weight.ndim == 2
    }


class LowRank(nn.Module):
    """One layer's LoRA; `up` starts at zero, so nothing changes yet. Of scale 1: alpha is rank."""

    def __init__(self, rows: int, columns: int, rank: int, draw: torch.Generator):
        super().__init__()
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(rank, columns, generator=draw) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Tensor, frozen: bool) -> Tensor:
        """(…, columns) to (…, rows), in x's type; `frozen`: no gradient but x's."""
        down, up = (w.detach() if frozen else w for w in (self.down, self.up))
        return linear(linear(x, down.to(x.dtype)), up.to(x.dtype))

    def state(self, name: str) -> dict[str, Tensor]:
        """As in a LoRA's file, of the layer of that name."""
        return {
            f"{name}.lora_up.weight": _copied(self.up),
            f"{name}.lora_down.weight": _copied(self.down),
            f"{name}.alpha": torch.tensor(float(len(self.down))),
        }

    def take(self, state: Mapping[str, Tensor], name: str) -> None:
        rank = len(self.down)
        alpha = torch.as_tensor(state.get(f"{name}.alpha", float(rank)))
        if alpha.numel() != 1:
            raise ValueError(
                f"the LoRA to start from has {alpha.numel()} numbers for {name}.alpha, "
                "expected one: start from another"
            )
        _fill(self.down, state, f"{name}.lora_down.weight")
        _fill(self.up, state, f"{name}.lora_up.weight", float(alpha) / rank)  # 1 of our own


class Whole(nn.Module):
    """What is added to one layer's whole weight, and to its bias; zero at first."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layer.weight.shape))
        self.bias = None if layer.bias is None else nn.Parameter(torch.zeros(layer.bias.shape))

    def forward(self, x: Tensor, frozen: bool) -> Tensor:
        """As LowRank."""
        given = [None if w is None else w.to(x.dtype) for w in (self.weight, self.bias)]
        return linear(x, *(w.detach() if frozen and w is not None else w for w in given))

    def state(self, name: str) -> dict[str, Tensor]:
        """As in a LoRA's file: full differences."""
        state = {f"{name}.diff": _copied(self.weight)}
        return state if self.bias is None else state | {f"{name}.diff_b": _copied(self.bias)}

    def take(self, state: Mapping[str, Tensor], name: str) -> None:
        _fill(self.weight, state, f"{name}.diff")
        if self.bias is not None:
            _fill(self.bias, state, f"{name}.diff_b")


class LoRASet(nn.Module):
    """A LoRA on each of `layers`, in float32; of rank 0, all of each."""

    def __init__(self, layers: Mapping[str, nn.Module], rank: int, seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.names = list(layers)
        self.layers = nn.ModuleList(
            LowRank(*layer.weight.shape, rank, draw) if rank else Whole(layer)
            for layer in layers.values()
        )

    def state(self) -> dict[str, Tensor]:
        """As in a LoRA's file, in the CPU's memory."""
        state = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            state |= layer.state(name)
        return state

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor]) -> None:
        """Raises: ValueError naming the first tensor that does not fit, is not finite or belongs to
        no layer of these."""
        for name, layer in zip(self.names, self.layers, strict=True):
            layer.take(state, name)
        known = tuple(f"{name}." for name in self.names)
        for key in state:
            if not key.startswith(known):
                raise ValueError(
                    f"the LoRA to start from has {key}, for which this model has no layer: start "
                    "from one of the same model"
                )


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _fill(own: Tensor, state: Mapping[str, Tensor], name: str, scale: float = 1.0) -> None:
    given = state.get(name)
    if given is None or given.shape != own.shape:
        has = "nothing" if given is None else f"shape {tuple(given.shape)}"
        raise ValueError(
            f"the LoRA to start from has {has} for {name}, expected {tuple(own.shape)}: start "
            "from one of the same model and rank"
        )
    own.copy_(scale * given.float())
    if not is_finite(own):
        raise ValueError(
            f"the LoRA to start from holds NaN or infinity in {name} or its alpha: start from "
            "another"
        )


class Switch:
    """Which set the layers of one network add, None for none, and whether it is `frozen`."""

    def __init__(self):
        self.on: tuple[LoRASet | None, bool] = (None, False)

    @contextmanager
    def set(self, loras: LoRASet | None, frozen: bool) -> Iterator[None]:
        before, self.on = self.on, (loras, frozen)
        try:
            with _Differentiable():
                yield
        finally:
            self.on = before

    def held(self) -> Callable[[], AbstractContextManager]:
        """A context that sets what is set now."""
        return partial(self.set, *self.on)


class _Differentiable(TorchFunctionMode):
    """Has plain torch compute comfy_kitchen's operations where there are gradients: of its own
    kernels torch knows no derivative, and not all of the host's models ask for another way.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if isinstance(function, OpOverload | OpOverloadPacket) and torch.is_grad_enabled():
            space, name = str(function).split(".")[:2]
            if space == "comfy_kitchen":
                function = getattr(eager, name)
        return function(*args, **(kwargs or {}))


class _Frozen(torch.autograd.Function):
    """A layer of which only the input gets a gradient: forward by the host, backward by weight."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module, forward) -> Tensor:
        ctx.layer = layer
        return forward(x.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        with dense_weight(ctx.layer, gradient) as weight:
            return gradient @ weight, None, None


@contextmanager
def dense_weight(layer: nn.Module, like: Tensor) -> Iterator[Tensor]:
    """A layer's weight as it is used, patches included, in the type and on the device of `like`."""
    if isinstance(layer, comfy.ops.CastWeightBiasOp) and hasattr(layer, "gguf_file"):
        given = layer.cast(like.dtype, like.device, layer.waiting_patch())
    else:
        given = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    weight = given[0]
    try:
        yield weight.dequantize().to(like) if isinstance(weight, QuantizedTensor) else weight
    finally:
        comfy.ops.uncast_bias_weight(layer, *given)


class _Beside(WeightAdapterTrainBase):
    """What the host's bypass calls in a layer's place."""

    def __init__(self, switch: Switch, layer: nn.Module, place: int, name: str):
        super().__init__()
        self.switch, self.place, self.name = switch, place, name
        object.__setattr__(self, "layer", layer)  # not ours to register

    def bypass_forward(self, forward, x: Tensor, *args, **kwargs) -> Tensor:
        """Raises: ValueError for vectors of another width than the layer's."""
        if x.shape[-1] != self.layer.weight.shape[1]:
            raise ValueError(
                f"{self.name} takes vectors of {self.layer.weight.shape[1]} numbers and is given "
                f"{x.shape[-1]}: encode the prompts with the text encoders of this model"
            )
        made = _Frozen.apply(x, self.layer, forward)
        loras, frozen = self.switch.on
        return made if loras is None else made + loras.layers[self.place](x, frozen)


@contextmanager
def switched(model: nn.Module, recompute: bool) -> Iterator[tuple[Switch, dict[str, nn.Module]]]:
    """The switch of a BaseModel's network, and the layers that it is for.

    recompute: keep only what each block is given for the backward (gradient checkpointing).
    """
    switch, layers = Switch(), linear_layers(model)
    manager = BypassInjectionManager()
    for place, (name, layer) in enumerate(layers.items()):
        manager.add_adapter(f"{name}.weight", _Beside(switch, layer, place, name))
    injections = manager.create_injections(model)
    lists = block_lists(model) if recompute else []
    recomputed = [block for members in lists for block in members]
    own = _plain_tensors(model, set(layers.values()))
    try:
        for injection in injections:
            injection.inject(None)
        for block in recomputed:
            block.forward = recomputing(block.forward, switch.held)
        # what is saved may be changed in place, as in `recomputing`
        with nullcontext() if recompute else allow_mutation_on_saved_tensors():
            yield switch, layers
    finally:
        for block in recomputed:
            del block.forward  # the class's own shows again
        for injection in injections:
            injection.eject(None)
        for tensors, name, tensor in own:
            tensors[name] = tensor


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks that a BaseModel's network is made of."""
    return [m for m in model.get_submodule(ROOT).children() if isinstance(m, nn.ModuleList)]


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Share a BaseModel's blocks out over the processes of `mesh` (FSDP), block by block, then move
    it to `device`: each process keeps a part of every plain weight, and is sent the rest while the
    block computes. Quantised ones, small already, stay whole. There is no way back.
    """
    for block in (block for members in block_lists(model) for block in members):
        whole = {p for p in block.parameters() if isinstance(p, QuantizedTensor) or p.ndim == 0}
        # without the word a block that is wrapped on its own stays gathered
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device)


def _plain_tensors(model: nn.Module, but: set[nn.Module]) -> list[tuple[dict, str, Tensor]]:
    """Put clones in place of small tensors made in inference mode, which autograd cannot keep;
    `but`: layers whose tensors it need not keep. What stood where: (dict, name, tensor).
    """
    stood = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers) if module not in but else ():
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, QuantizedTensor):
                    continue
                if tensor.is_inference():
                    stood.append((tensors, name, tensor))
                    clone = tensor.clone()
                    is_parameter = tensors is module._parameters
                    tensors[name] = nn.Parameter(clone, False) if is_parameter else clone
    return stood
