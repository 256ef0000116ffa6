"""One side of a comparison in a process of its own: it answers a line of JSON with another.

    {"do": "load", "file": …}           -> {"wall", "cpu"} seconds
    {"do": "step", "pixels": 256}       -> the same, of a sampling step; of two with "batch": 2
    {"do": "loras", "count": 4}         -> {} from now on the model has so many rank-16 LoRAs
    {"do": "load_encoder", "file": …}   -> the same
    {"do": "encode", "tokens": 77}      -> the same, of encoding so many words
    {"do": "load_encoders", "files": …} -> the same
    {"do": "prompt", "text": …}         -> the same, of encoding it; "guided": and an empty one
    {"do": "sample", "pixels": 256, "steps": 4, "cfg": 1} -> the same, of the prompt's latent
    {"do": "load_vae", "file": …}       -> the same
    {"do": "decode", "pixels": 256}     -> the same, of decoding a picture; "encode_picture": back
    {"do": "memory"}                    -> {"bytes"} at the most so far
    {"do": "rates", …}, {"do": "files"}, {"do": "source"}, {"do": "quantise"} -> see there

A process of its own keeps memory apart, and the sides can take turns.
"""

import importlib
import json
import os
import queue
import resource
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TOKENS, WIDTH, POOLED = 77, 4096, 2048  # SD3's text, encoded
RANK = 16


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def now() -> dict[str, float]:
    return {name: clock() for name, clock in CLOCKS.items()}


def since(start: dict[str, float]) -> dict[str, float]:
    return {name: clock() - start[name] for name, clock in CLOCKS.items()}


def seconds(run) -> dict[str, float]:
    start = now()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return since(start)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Host:
    """ComfyUI itself, with an unquantised model."""

    def __init__(self):
        for module in ("comfy.sample", "comfy.sd"):
            importlib.import_module(module)  # before any clock runs
        self.model, self.plain = None, None

    def load_model(self, file: str):
        import comfy.sd

        return comfy.sd.load_diffusion_model(file)

    def load(self, file: str) -> dict:
        def run():
            self.model = self.plain = self.load_model(file)

        return seconds(run)

    def step(self, pixels: int, batch: int = 1) -> dict:
        import comfy.sample

        g = torch.Generator().manual_seed(0)
        pooled = {"pooled_output": torch.randn(1, POOLED, generator=g)}
        cond = [[torch.randn(1, TOKENS, WIDTH, generator=g), pooled]]
        noise = torch.randn(batch, 16, pixels // 8, pixels // 8, generator=g)

        def run():
            with torch.inference_mode():
                drawn = comfy.sample.sample(
                    *(self.model, noise, 1, 1.0, "euler", "simple", cond, cond),
                    torch.zeros_like(noise),
                    seed=0,
                    disable_pbar=True,
                )
            if not drawn.isfinite().all():
                raise ValueError("the picture is not finite")

        return seconds(run)

    def load_encoder(self, file: str) -> dict:
        def run():
            self.clip = self.make_encoder(file)

        return seconds(run)

    def encode(self, tokens: int) -> dict:
        """A T5 alone, as SD3's text encoder, reading so many words."""
        t5 = [[(3 + n, 1.0) for n in range(tokens - 1)] + [(1, 1.0)]]
        words = {"l": [], "g": [], "t5xxl": t5}

        def run():
            with torch.inference_mode():
                encoded = self.clip.encode_from_tokens(words)
            if not encoded.isfinite().all():
                raise ValueError("the text's encoding is not finite")

        return seconds(run)

    def load_vae(self, file: str) -> dict:
        def run():
            self.vae = self.make_vae(file)

        return seconds(run)

    def make_vae(self, file: str):
        """As the node Load VAE does."""
        import comfy.sd
        import comfy.utils

        weights, metadata = comfy.utils.load_torch_file(file, return_metadata=True)
        return comfy.sd.VAE(sd=weights, metadata=metadata)

    def decode(self, pixels: int) -> dict:
        side, g = pixels // 8, torch.Generator().manual_seed(0)
        latent = torch.randn(1, 16, side, side, generator=g)
        return self._through_vae("decode", latent)

    def encode_picture(self, pixels: int) -> dict:
        g = torch.Generator().manual_seed(0)
        return self._through_vae("encode", torch.rand(1, pixels, pixels, 3, generator=g))

    def _through_vae(self, way: str, value: torch.Tensor) -> dict:
        def run():
            with torch.inference_mode():
                made = getattr(self.vae, way)(value)
            if not made.isfinite().all():
                raise ValueError(f"what the VAE makes by {way} is not finite")

        return seconds(run)

    def loras(self, count: int) -> dict:
        import comfy.sd

        self.model = self.plain
        for seed in range(count):
            file = random_lora(self.plain, seed)
            self.model = comfy.sd.load_lora_for_models(self.model, None, file, 0.5, 0)[0]
        return {}


class FewStep(Host):
    """This project, with a GGUF file."""

    def __init__(self, runtime: str = "exact"):
        super().__init__()
        self.loading = importlib.import_module("fewstep.host.loading")
        self.runtime = runtime

    def load_model(self, file: str):
        return self.loading.load_diffusion_model(file, runtime=self.runtime)

    def make_encoder(self, file: str):
        return self.loading.load_text_encoders([file])

    def make_vae(self, file: str):
        return self.loading.load_vae(file)

    def load_encoders(self, files: list[str]) -> dict:
        def run():
            self.clip = self.loading.load_text_encoders(files)

        return seconds(run)

    def prompt(self, text: str, guided: bool) -> dict:
        from fewstep.host.text import encode

        def run():
            with torch.inference_mode():
                self.positive = encode(self.clip, text)
                self.negative = encode(self.clip, "") if guided else None

        return seconds(run)

    def sample(self, pixels: int, steps: int, cfg: float) -> dict:
        """From noise, in even steps with SD3's shift."""
        from fewstep.flow import uniform
        from fewstep.host import sampling

        side = pixels // 8
        latent = {"samples": torch.zeros(1, 16, side, side)}
        euler, sigmas = sampling.make_sampler("euler", None), uniform(steps, 3.0)
        told = (self.positive, self.negative, latent, 0, cfg, euler, sigmas)

        def run():
            with torch.inference_mode():
                drawn = sampling.sample(self.model, *told)["samples"]
            if not drawn.isfinite().all():
                raise ValueError("the picture is not finite")

        return seconds(run)

    def rates(self, weights: int, repeats: int, clock: str) -> dict:
        """Gel/s of dequantising to bfloat16 by type, and of copying float32 to bfloat16."""
        from fewstep.quant import QTYPES, dequantize

        device = "cuda" if torch.cuda.is_available() else "cpu"
        out = torch.empty(weights, dtype=torch.bfloat16, device=device)
        floats = torch.randn(weights, device=device)
        runs = {"copy": lambda: out.copy_(floats)}
        for qtype, row in QTYPES.items():
            shape = weights // row.block_size, row.type_size
            blocks = torch.randint(0, 64, shape, dtype=torch.uint8, device=device)
            runs[qtype.name] = lambda b=blocks, t=qtype: dequantize(
                b, t, (weights,), torch.bfloat16, out
            )
        times = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():
                spent = seconds(run)[clock]
                if turn:  # the first one compiles
                    times[name].append(spent)
        rate = {name: sorted(weights / t / 1e9 for t in spent) for name, spent in times.items()}
        return {"rates": rate}

    def files(self, folder: str, types: list[str]) -> dict:
        """Makes the files of the comparison. -> their paths by type, and see `dense_files`."""
        from fewstep.bench import files
        from gguf import GGMLQuantizationType

        made = {t: files.gguf_file(Path(folder), GGMLQuantizationType[t]) for t in types}
        made |= files.dense_files(Path(folder))
        return {"paths": {name: str(path) for name, path in made.items()}}

    def source(self, folder: str) -> dict:
        """Makes the file that is converted. -> its path"""
        from fewstep.bench import files

        return {"path": str(files.bfloat16_file(Path(folder)))}

    def quantise(self, file: str, qtype: str) -> dict:
        """What the node FewStep Quantize does with the MODEL. -> also the bytes that it took up
        beside the MODEL (of Linux; pages of mapped files, which the system may drop, not counted).
        """
        from fewstep.host.quantizing import quantize_model

        most = [before := anonymous_bytes()]
        done = threading.Event()

        def watch():
            while not done.wait(0.01):
                most.append(anonymous_bytes())

        threading.Thread(target=watch, daemon=True).start()
        start = now()
        with torch.inference_mode():
            quantize_model(self.model, Path(file), qtype)
        spent = since(start)["wall"]
        done.set()
        return {"seconds": spent, "above the loaded model": max(most) - before}

    def encoder_file(self, folder: str, type: str) -> dict:
        from fewstep.bench import files
        from gguf import GGMLQuantizationType

        return {"path": str(files.t5_file(Path(folder), GGMLQuantizationType[type]))}

    def vae_file(self, folder: str, kind: str) -> dict:
        from fewstep.bench import files

        return {"path": str(files.vae_file(Path(folder), kind))}


class PeerGGUF(Host):
    """A clone of ComfyUI-GGUF, loaded as ComfyUI loads a pack; its own loader node."""

    def __init__(self, folder: str):
        super().__init__()
        sys.path.insert(0, str(Path(folder).parent))
        self.nodes = importlib.import_module(f"{Path(folder).name}.nodes")

    def load_model(self, file: str):
        import folder_paths

        folder_paths.add_model_folder_path("unet", str(Path(file).parent))
        return self.nodes.UnetLoaderGGUF().load_unet(Path(file).name)[0]

    def make_encoder(self, file: str):
        import folder_paths

        folder_paths.add_model_folder_path("clip", str(Path(file).parent))
        return self.nodes.CLIPLoaderGGUF().load_clip(Path(file).name, "sd3")[0]


class Cpp:
    """stable-diffusion.cpp through its Python package, in one long generation: it waits after each
    step, in the progress callback, until the next one is asked for. So it can take turns, and never
    comes to decode a picture. One size for each process.
    """

    def __init__(self, *parts: str):
        self.model, self.asked, self.done = None, queue.Queue(), queue.Queue()
        self.parts = dict(zip(("clip_l_path", "clip_g_path", "vae_path"), parts, strict=True))

    def load(self, file: str) -> dict:
        from stable_diffusion_cpp import StableDiffusion

        def run():
            threads = torch.get_num_threads()
            self.model = StableDiffusion(
                diffusion_model_path=file, n_threads=threads, verbose=False, **self.parts
            )

        return seconds(run)

    def step(self, pixels: int) -> dict:
        if self.model is not None:
            size = {"width": pixels, "height": pixels}
            threading.Thread(target=self.generate, args=(self.model, size), daemon=True).start()
            self.model = None
            self.done.get()  # the text is encoded
        self.asked.put(now())
        return self.done.get()

    def generate(self, model, size: dict[str, int]) -> None:
        start = now()

        def progress(*_):
            nonlocal start
            self.done.put(since(start))
            start = self.asked.get()

        model.generate_image(
            prompt="a", sample_steps=1000, cfg_scale=1.0, progress_callback=progress, **size
        )


def random_lora(model, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank RANK on every matrix of the model's blocks, in float16, as they are sold."""
    g, file = torch.Generator().manual_seed(seed), {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if "_blocks." in name and name.endswith(".weight") and weight.ndim == 2:
            key, (rows, columns) = f"diffusion_model.{name[:-7]}.lora_", weight.shape
            file[key + "up.weight"] = torch.randn(rows, RANK, generator=g).half() * 0.01
            file[key + "down.weight"] = torch.randn(RANK, columns, generator=g).half() * 0.01
    return file


SIDES = {"fewstep": FewStep, "runtime": FewStep, "host": Host, "peer-gguf": PeerGGUF, "cpp": Cpp}


def prepare() -> None:
    """ComfyUI and the pack importable, on the GPU if there is one."""
    sys.path.insert(0, str(ROOT))
    run = importlib.import_module("run")
    run.load_pack("fewstep")
    if torch.cuda.is_available():
        sys.path.insert(0, str(run.comfyui_folder()))
    else:
        from fewstep.tests import in_process

        in_process.prepare()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    side, threads, *arguments = sys.argv[1:]
    torch.set_num_threads(int(threads))
    sys.argv[1:] = []
    if side != "cpp":
        prepare()
    worker = SIDES[side](*arguments)
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        answer = peak() if action == "memory" else getattr(worker, action)(**request)
        print(json.dumps(answer), file=answers)
    os._exit(0)  # a generation may still be waiting


def peak() -> dict:
    unit = 1 if sys.platform == "darwin" else 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"bytes": size, "device_bytes": device}


if __name__ == "__main__":
    main()
