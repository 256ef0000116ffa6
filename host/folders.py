"""Where model files lie: the host's folders, the users' GGUF folders, and the files that ship."""

import os

import folder_paths

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = os.path.join(ROOT, "demo", "models")
EXTENSIONS = {".gguf", ".safetensors", ".sft"}

# the host's folder key -> the key that users' configurations name for GGUF files (ComfyUI-GGUF's)
KEYS = {"diffusion_models": "unet_gguf", "text_encoders": "clip_gguf", "vae": "vae_gguf"}
IMPORTANCE = "importance"  # below the output folder, and below models/


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


def offer_loras() -> None:
    """Have the host's own LoRA loaders list those that ship, after the users'."""
    folder_paths.add_model_folder_path("loras", os.path.join(SHIPPED, "loras"))


def model_names(key: str) -> list[str]:
    """Files of a kind (a key of `KEYS`) that our loaders read, GGUF first, for an input's list."""
    names = folder_paths.get_filename_list(model_key(key))
    return sorted(names, key=lambda name: not name.lower().endswith(".gguf"))


def model_path(key: str, name: str) -> str:
    """A name of `model_names` -> its full path.

    Raises: FileNotFoundError naming the file and the folders that were searched.
    """
    return _path(model_key(key), name)


def _path(own: str, name: str) -> str:
    path = folder_paths.get_full_path(own, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(own))
        raise FileNotFoundError(
            f"{name} is not there any more. Put it into one of these folders, press R: {searched}"
        )
    return path


def importance_key() -> str:
    """The folder key of importance files: where we write them, and models/importance."""
    written = os.path.join(folder_paths.get_output_directory(), IMPORTANCE)
    own = f"fewstep_{IMPORTANCE}"
    paths = [written, os.path.join(folder_paths.models_dir, IMPORTANCE)]
    folder_paths.folder_names_and_paths[own] = (paths, {".gguf"})
    return own


def importance_names() -> list[str]:
    """Importance files for an input's list."""
    return folder_paths.get_filename_list(importance_key())


def importance_path(name: str) -> str:
    """A name of `importance_names` -> its full path. Raises: FileNotFoundError, as `model_path`."""
    return _path(importance_key(), name)


def any_model_names() -> list[str]:
    """Files of every kind of `KEYS` as 'folder/name', for an input's list."""
    return [f"{key}/{name}" for key in KEYS for name in model_names(key)]


def any_model_path(name: str) -> str:
    """A name of `any_model_names` -> its full path. Raises: FileNotFoundError, as `model_path`."""
    key, _, inner = name.partition("/")
    return model_path(key, inner)
