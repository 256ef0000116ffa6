"""ComfyUI's operations over GGUF weights.

The classes derive from the host's `manual_cast`, so that casting, offloading and LoRA patches stay
the host's. They add five things: weights are taken over from the state dict instead of copied (a
quantised weight cannot be copied into a float parameter, and a mapped file should not be); a
weight that the host patches is dequantised first; a LoRA on a linear layer is computed beside its
weight (see `lora.py`); products take the type and the kernel that are fast on the device (see
`cpu.py`, `gpu.py`), as do norms; and a result that is not finite names its tensor.
"""

import re

import comfy.float
import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ..quant import dequantize_rows
from .compiled import OneOperation
from .cpu import may_choose, multiply_packed, normalize, product_dtype
from .gpu import multiply_on_gpu
from .hooks import TakesHooks, is_loaders
from .layout import dense, is_gguf
from .lora import TakesLoRA
from .residency import Residency
from .runtime import NotFiniteError, Runtime
from .saving import SavedWeight


class SourceFile:
    """The file (or files) behind a model's weights: what was found, and errors that name it."""

    def __init__(self, path: str):
        self.path, self.loaded, self.missing = path, [], []

    def check_complete(self) -> None:
        """Raises: ValueError if a part of the model has only some of its weights: the host would
        draw with zeros in place of the others. What is missing as a whole is optional.
        """
        for name in self.missing:
            numbered = re.match(r"(.*?\.)\d+\.", name)
            parent = numbered[1] if numbered else name.rpartition(".")[0].rpartition(".")[0] + "."
            if parent != "." and any(loaded.startswith(parent) for loaded in self.loaded):
                raise ValueError(
                    f"{self.path}: tensor {name} is missing, though the rest of {parent}* is "
                    "there. The file was badly converted: get another one."
                )

    def not_finite(self, name: str) -> ValueError:
        return ValueError(
            f"{self.path}: tensor {name} holds NaN or infinity, so every picture made with it "
            "would be black. The file is damaged or was badly converted: download it again or get "
            "another quantisation of it."
        )


class _TakeOver(TakesHooks):
    """Mixin for operations whose weight may stay quantised. `gguf_file` is their SourceFile,
    `gguf_residency` may keep what is unpacked; `gguf_exact` asks for products as the host would
    compute them, `gguf_text` marks text encoders.
    """

    comfy_force_cast_weights = gguf_exact = gguf_text = False

    def __init__(self, *args, device=None, **kwargs):
        super().__init__(*args, device="meta", **kwargs)  # the weights bring their own memory

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self.gguf_name, self.gguf_checked = prefix, False
        for name, old in list(self._parameters.items()):
            if old is None:
                continue
            new = state_dict.get(prefix + name)
            found = self.gguf_file.missing if new is None else self.gguf_file.loaded
            found.append(prefix + name)
            if new is None:
                missing_keys.append(prefix + name)
                new = torch.zeros(old.shape, dtype=old.dtype)
            elif new.shape != old.shape:
                raise ValueError(
                    f"{self.gguf_file.path}: tensor {prefix}{name} has shape {tuple(new.shape)}, "
                    f"the model needs {tuple(old.shape)}. The file was badly converted, or is of a "
                    "variant that this ComfyUI does not know: update ComfyUI or get another file."
                )
            setattr(self, name, torch.nn.Parameter(new, requires_grad=False))

    def _apply(self, fn, recurse=True):
        """`.to()` on a quantised parameter gives a new one: torch would write into the old."""
        for name, param in self._parameters.items():
            if param is None or param.is_meta:
                continue
            new = fn(param)
            if new.is_inference() and not torch.is_inference_mode_enabled():
                new = new.clone()  # a parameter cannot wrap an inference tensor
            if new is not param:
                self.gguf_residency.release(self)
                self._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Without torch's `detach`, which fails on a quantised parameter in inference mode; and
        with the LoRA that waits for the weight.
        """
        waits = self.waiting_patch() is not None
        for name, param in self._parameters.items():
            if param is not None:
                made = isinstance(param, QuantizedTensor) or (waits and name == "weight")
                saved = SavedWeight(self) if made else param
                destination[prefix + name] = saved if keep_vars else saved.detach()

    def convert_weight(self, weight, inplace=False, **_options):
        """Host's hook: the weight as floats, before patches are added to it."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **_options):
        """Host's hook: takes a patched weight. A quantised one is kept dense, since its type could
        not hold a patch finer than its own rounding; where the host needs the same size again
        (saving, hooks) it is quantised anew.
        """
        if isinstance(self.weight, QuantizedTensor):
            if return_weight or inplace_update:
                weight = self.weight.requantize_from_float(weight, scale="recalculate")
        else:
            weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
        if return_weight:
            return weight
        if inplace_update:
            self.weight.data.copy_(weight)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
        return None

    @property
    def weight_lowvram_function(self):
        """The host's dynamic VRAM hangs a LoRA patch here and, once it has applied it, writes the
        sum back in the weight's own type. Quantised, that would round the patch away, so the host
        finds none and `cast` adds it to the floats.
        """
        return None

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch):
        self.gguf_patch = patch

    def cast(self, dtype, device, waiting=None, beside=False, transient=False, branch=None):
        """Weight and bias in `dtype` on `device`, with what `waiting_patch` gave added, unless that
        is computed `beside` the weight, or is a side `branch` that is merged into it; and the
        host's return token. `transient`: until the next.
        """
        weight, bias, stream, functions = self.weight, self.bias, None, self.weight_function
        ours = waiting is not None and (beside or waiting not in functions)
        there = weight.device == device and (bias is None or bias.device == device)
        if there and not (functions or self.bias_function or "_v" in self.__dict__):
            bias = None if bias is None else bias.to(dtype)  # as the host would, only sooner
        else:
            weight, bias, stream = self.cast_by_host(dtype, device, ours)
        patched = ours and not beside
        if isinstance(weight, QuantizedTensor):
            if patched:
                weight = dense(weight, dtype)
            else:
                weight = self.gguf_residency.dense(self, weight, dtype, transient, branch)
        elif branch is not None:
            weight = branch.merged(weight, dtype)
        else:
            weight = weight.to(dtype)
        if patched:
            weight = waiting(weight.clone() if weight is self.weight else weight)
        return weight, bias, stream

    def cast_by_host(self, dtype, device, ours):
        """As `cast`, with what is quantised still packed where it can be; without the host's patch
        from among the functions if that is `ours` to apply.
        """
        functions = self.weight_function
        if ours:
            self.weight_function = [f for f in functions if not is_loaders(f)]
        try:
            # asked for a quantised weight in its own type, the host leaves the unpacking to us
            packed = self.comes_packed(device) and not self.weight_function
            return comfy.ops.cast_bias_weight(
                self,
                dtype=self.weight.dtype if packed else dtype,
                device=device,
                bias_dtype=dtype,
                offloadable=True,
            )
        finally:
            if ours:
                self.weight_function = functions

    def comes_packed(self, device) -> bool:
        """Whether the host can hand the weight over on `device` as blocks. On the CPU, which is not
        where its dynamic VRAM loads a weight, it unpacks it, to whatever type it is asked for.
        """
        on_cpu = comfy.model_management.is_device_cpu(device)
        return is_gguf(self.weight) and not (on_cpu and "_v" in self.__dict__)

    def uncast(self, weight, bias, stream):
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def apply_weight(self, function, input, waiting=None, beside=False, branch=None):
        """function(input, weight, bias), both in the input's type, see `cast`; the result is
        checked once.
        """
        transient = not torch.is_grad_enabled()  # autograd keeps the weight for the backward
        given = self.cast(input.dtype, input.device, waiting, beside, transient, branch)
        weight, bias, stream = given
        output = function(input, weight, bias)
        self.uncast(weight, bias, stream)
        if not self.gguf_checked and not torch.compiler.is_compiling():
            self.check(input, output)
        return output

    def check(self, input, output):
        """Once a load: a weight that is not finite, LoRAs aside, is named: the picture would be
        black.
        """
        black = not output.isfinite().all() and input.isfinite().all()
        if black and not dense(self.weight, input.dtype).to(input.dtype).isfinite().all():
            raise self.gguf_file.not_finite(self.gguf_name + "weight")
        self.gguf_checked = True


class _Dense:
    """Mixin for operations whose weight is small: a quantised one is dequantised while loading."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self._parameters:
            if is_gguf(state_dict.get(prefix + name)):
                state_dict[prefix + name] = state_dict[prefix + name].dequantize()
        super()._load_from_state_dict(state_dict, prefix, *args)


def gguf_ops(
    path: str,
    exact: bool = False,
    text_encoder: bool = False,
    budget: int | None = 0,
    runtime: Runtime | None = None,
) -> type:
    """The host's operations over the weights of one file; its `gguf_file` says what it found there.
    `exact`: with products as the host would compute them. `budget`: see `residency.py`. `runtime`:
    what linear layers' weights are turned into.

    A class of its own for each file, so that nothing set for one model shows in another.
    """
    host = comfy.ops.manual_cast

    class TakeOver(_TakeOver):
        gguf_file, gguf_exact, gguf_text = SourceFile(path), exact, text_encoder
        gguf_residency = Residency(budget)

    class Conv(TakeOver):
        def forward_comfy_cast_weights(self, input):
            return self.apply_weight(self._conv_forward, input, self.waiting_patch())

    class GGUFOps(host):
        gguf_file, gguf_residency = TakeOver.gguf_file, TakeOver.gguf_residency

        class Linear(OneOperation, TakesLoRA, TakeOver, host.Linear):
            turned = False  # whether the weight is as `runtime` multiplies it

            def _load_from_state_dict(self, *args):
                super()._load_from_state_dict(*args)
                self.turned = runtime is not None and is_gguf(self.weight)
                if self.turned:
                    try:
                        weight = runtime.turn(self.weight)
                    except NotFiniteError as error:
                        raise self.gguf_file.not_finite(self.gguf_name + "weight") from error
                    self.weight = torch.nn.Parameter(weight, requires_grad=False)

            def forward_comfy_cast_weights(self, input):
                waiting = self.waiting_patch()
                branch = self.side_branch(waiting)
                added = self.weight_function or self.bias_function or (waiting and not branch)
                if self.turned and not added and isinstance(self.weight, QuantizedTensor):
                    return self.multiply_turned(input, branch)
                output = None if added else self.by_kernel(input, branch)
                if output is not None and not self.gguf_checked:
                    self.gguf_checked = bool(output.isfinite().all())
                if output is None or not self.gguf_checked:
                    return self.multiply(input, waiting, branch)
                return output

            def by_kernel(self, input, branch):
                """The output from the packed weight; None where a CPU's or GPU's kernel is not the
                faster way, or a gradient is asked for: those have none.
                """
                biased = self.bias is not None and self.bias.requires_grad
                if input.requires_grad or (biased and torch.is_grad_enabled()):
                    return None
                output = multiply_packed(self, input, branch)
                return multiply_on_gpu(self, input, branch) if output is None else output

            def multiply(self, input, waiting, branch):
                x = input.to(product_dtype(self, input))
                linear, merged = torch.nn.functional.linear, self.merges(branch, x)
                output = self.apply_weight(
                    linear, x, waiting, branch is not None, branch if merged else None
                )
                if branch is not None and not merged:
                    output = branch.add(output, x)
                return output.to(input.dtype)

            def merges(self, branch, x):
                """Whether LoRAs are added to the unpacked weight, not to the product: where that
                is less work. A GPU's weight that stays unpacked has them in it, unless hooks may
                ask for others with the next conditioning; a CPU's stays as it is.
                """
                if branch is None or not branch.merges or torch.is_grad_enabled():
                    return False
                if isinstance(self.weight, QuantizedTensor) and self.gguf_residency.keeps(self):
                    return not x.is_cpu and self.gguf_hooks is None
                if branch.is_less_merged(x.numel() // x.shape[-1]):
                    return True
                return not x.is_cpu and branch.merges_unpacking(self.weight, x)

            def multiply_turned(self, input, branch):
                weight, bias, stream = self.cast_packed(input)
                output = runtime.multiply(input, weight, bias)
                self.uncast(weight, bias, stream)
                return output if branch is None else branch.add(output, input)

            def cast_packed(self, input):
                """(weight, bias, stream) where the input is, the weight as packed as it is; to be
                given back by `uncast`.
                """
                return comfy.ops.cast_bias_weight(
                    self,
                    dtype=self.weight.dtype,
                    device=input.device,
                    bias_dtype=input.dtype,
                    offloadable=True,
                )

        class Conv1d(Conv, host.Conv1d): ...

        class Conv2d(Conv, host.Conv2d): ...

        class Conv3d(Conv, host.Conv3d): ...

        class Embedding(TakeOver, host.Embedding):
            def forward_comfy_cast_weights(self, input, out_dtype=None):
                """Only the rows asked for are dequantised."""
                waiting = self.waiting_patch()
                if waiting is not None and waiting not in self.weight_function:
                    dtype = out_dtype or self.weight.dtype
                    weight, bias, stream = self.cast(dtype, input.device, waiting)
                    rows = torch.nn.functional.embedding(input, weight)
                elif self.comes_packed(input.device) and not self.weight_function:
                    weight, bias, stream = comfy.ops.cast_bias_weight(
                        self, dtype=self.weight.dtype, device=input.device, offloadable=True
                    )
                    rows = dequantize_rows(
                        weight._qdata,
                        weight.params.qtype,
                        self.embedding_dim,
                        input.reshape(-1),
                        out_dtype or weight.dtype,
                    ).reshape(*input.shape, self.embedding_dim)
                else:
                    return self.finite(
                        host.Embedding.forward_comfy_cast_weights(self, input, out_dtype)
                    )
                self.uncast(weight, bias, stream)
                return self.finite(rows)

            def finite(self, rows):
                if not rows.isfinite().all():
                    raise self.gguf_file.not_finite(self.gguf_name + "weight")
                return rows

        class ConvTranspose1d(_Dense, host.ConvTranspose1d): ...

        class ConvTranspose2d(_Dense, host.ConvTranspose2d): ...

        class GroupNorm(_Dense, host.GroupNorm): ...

        class LayerNorm(_Dense, host.LayerNorm): ...

        class RMSNorm(_Dense, host.RMSNorm):
            gguf_exact, gguf_text, comfy_force_cast_weights = exact, text_encoder, False

            def forward_comfy_cast_weights(self, input):
                made = normalize(self, input) if may_choose(self, input) else None
                return super().forward_comfy_cast_weights(input) if made is None else made

    return GGUFOps
