"""Where model files lie: the host's folders, the `.gguf` files its lists leave out, and our own."""

import os

import folder_paths

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = os.path.join(ROOT, "demo", "models")

# the host's folder key -> the key that users' configurations name for its GGUF files
KEYS = {"diffusion_models": "unet_gguf", "text_encoders": "clip_gguf", "vae": "vae_gguf"}


def register() -> None:
    """Makes `.gguf` files of the host's model folders, and the shipped ones, known to the host.

    Adds folder keys (the same that ComfyUI-GGUF uses) and leaves the host's own lists as they are.
    """
    for key, gguf_key in KEYS.items():
        for path in [*folder_paths.get_folder_paths(key), os.path.join(SHIPPED, key)]:
            folder_paths.add_model_folder_path(gguf_key, path)
        folder_paths.folder_names_and_paths[gguf_key][1].add(".gguf")


def model_names(key: str) -> list[str]:
    """Files of a kind (a key of `KEYS`) that our loaders read, GGUF first, for an input's list."""
    safe = [n for n in folder_paths.get_filename_list(key) if n.endswith((".safetensors", ".sft"))]
    return folder_paths.get_filename_list(KEYS[key]) + safe


def model_path(key: str, name: str) -> str:
    """A name of `model_names` -> its full path.

    Raises: FileNotFoundError naming the file and the folders that were searched.
    """
    folder = KEYS[key] if name.lower().endswith(".gguf") else key
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"{name} is not there any more. Put it into one of these folders, press R: {searched}"
        )
    return path
