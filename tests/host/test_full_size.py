"""SD3.5-Medium's size with random weights: `python run.py test --slow`. Needs 3 GB of disk."""

import resource
import sys
import time
from functools import partial

import comfy.sample
import gguf
import pytest
import torch
from fewstep.distill.few_step_lora import Plan, distil
from fewstep.host import loading
from fewstep.quant import write_gguf
from fewstep.tests.host import toys
from gguf import GGMLQuantizationType as T

BLOCK, SIZE = gguf.GGML_QUANT_SIZES[T.Q6_K]
POOL = 1 << 16  # blocks


def random_q6_k():
    """(POOL, 210) random blocks whose weights have a spread of about 0.02, as trained ones do."""
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (POOL, SIZE), generator=g, dtype=torch.uint8)
    blocks[:, 192:208] = torch.randint(-8, 8, (POOL, 16), generator=g).to(torch.uint8)  # scales
    blocks[:, 208:] = torch.full((POOL, 1), 2.3e-4, dtype=torch.float16).view(torch.uint8)
    return blocks


def repeated(pool, n):
    return pool.repeat(-(-n // POOL), 1)[:n]


def tensors():
    """SD3.5-Medium: 24 blocks, 13 of them with dual attention; matrices Q6_K, the rest F16, F32."""
    pool = random_q6_k()
    for name, like in toys.mmdit_shapes(24, positions=384, dual_blocks=13).state_dict().items():
        shape = tuple(like.shape)
        if like.ndim == 2 and shape[1] % BLOCK == 0:
            n = like.numel() // BLOCK
            yield name, (partial(repeated, pool, n), T.Q6_K, shape)
        else:
            dtype = torch.float16 if like.ndim > 1 else torch.float32
            yield name, torch.full(shape, 0.02, dtype=dtype)


@pytest.mark.slow
def test_sd35_medium_sized_file_loads_and_samples_in_quantised_memory(tmp_path):
    path = tmp_path / "medium-Q6_K.gguf"
    write_gguf(str(path), "sd3", {}, tensors())
    file_size = path.stat().st_size
    assert file_size > 2e9

    start = time.perf_counter()
    before = peak_memory()
    model = loading.load_diffusion_model(str(path))
    loaded = time.perf_counter() - start
    assert model.model.model_config.unet_config["depth"] == 24
    positions = 2 * 384**2 * 1536  # the host keeps this table as float32, the file as float16
    assert model.model_size() < 1.02 * file_size + positions

    cond = [[torch.zeros(1, 77, 4096), {"pooled_output": torch.zeros(1, 2048)}]]
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    drawn = comfy.sample.sample(
        model, noise, 1, 1.0, "euler", "simple", cond, cond, torch.zeros_like(noise), seed=0
    )
    step = time.perf_counter() - start
    grown = peak_memory() - before
    print(f"\nloaded in {loaded:.2f} s, one step {step:.1f} s, {grown / 1e9:.2f} GB more memory")
    assert drawn.isfinite().all() and drawn.std() > 0
    assert (
        grown < file_size + positions + 1e9
    )  # the file's pages, one dequantised layer, activations


@pytest.mark.slow
def test_sd35_medium_sized_file_learns_a_lora_beside_its_quantised_weights(tmp_path):
    path = tmp_path / "medium-Q6_K.gguf"
    write_gguf(str(path), "sd3", {}, tensors())
    cond = [torch.zeros(1, 77, 4096), {"pooled_output": torch.zeros(1, 2048)}]
    model, before = loading.load_diffusion_model(str(path)), peak_memory()
    plan = Plan((1.0, 0.5, 0.0), "matching", steps=2, teacher_steps=2, trajectories=1)
    lora, losses = distil(model, [cond], None, torch.zeros(1, 16, 16, 16), plan)
    grown = peak_memory() - before
    print(f"\nlosses {losses}, {grown / 1e9:.2f} GB more memory for {len(lora) // 3} weights")
    assert all(value.isfinite().all() for value in lora.values())
    assert any(value.any() for name, value in lora.items() if "lora_up" in name)
    assert grown < 1.1 * path.stat().st_size + 2e9  # the file's pages; LoRAs, a layer unpacked


def peak_memory():
    """Bytes of this process's largest resident set so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
