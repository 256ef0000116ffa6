"""Where model files lie: the host's folders, the users' GGUF folders, and the files that ship."""

import os

import folder_paths

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = os.path.join(ROOT, "demo", "models")
EXTENSIONS = {".gguf", ".safetensors", ".sft"}

# the host's folder key -> the key that users' configurations name for GGUF files (ComfyUI-GGUF's)
KEYS = {"diffusion_models": "unet_gguf", "text_encoders": "clip_gguf", "vae": "vae_gguf"}


def model_key(key: str) -> str:
    """Our own folder key for a key of `KEYS`, brought up to date: all folders that hold such files.

    The host's lists leave `.gguf` out and stay as they are; so do the keys of other packs.
    """
    paths = list(folder_paths.get_folder_paths(key))
    if KEYS[key] in folder_paths.folder_names_and_paths:
        paths += folder_paths.get_folder_paths(KEYS[key])
    paths.append(os.path.join(SHIPPED, key))
    own = f"fewstep_{key}"
    folder_paths.folder_names_and_paths[own] = (list(dict.fromkeys(paths)), EXTENSIONS)
    return own


def model_names(key: str) -> list[str]:
    """Files of a kind (a key of `KEYS`) that our loaders read, GGUF first, for an input's list."""
    names = folder_paths.get_filename_list(model_key(key))
    return sorted(names, key=lambda name: not name.lower().endswith(".gguf"))


def model_path(key: str, name: str) -> str:
    """A name of `model_names` -> its full path.

    Raises: FileNotFoundError naming the file and the folders that were searched.
    """
    own = model_key(key)
    path = folder_paths.get_full_path(own, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(own))
        raise FileNotFoundError(
            f"{name} is not there any more. Put it into one of these folders, press R: {searched}"
        )
    return path
