"""Few-step sampling as pure maths on tensors: schedules, step rules, presets. No ComfyUI here."""

from .metadata import preset_from_metadata, preset_to_metadata, without_preset
from .presets import SURE, T5_MODES, Preset
from .rules import RULES, sample_euler, sample_renoise
from .schedules import check_sigmas, flux2_mu, parse_sigmas, resample, shift_from_mu, uniform
from .table import PRESETS, find_preset
from .user_presets import load_user_presets

__all__ = [
    "PRESETS",
    "RULES",
    "SURE",
    "T5_MODES",
    "Preset",
    "check_sigmas",
    "find_preset",
    "flux2_mu",
    "load_user_presets",
    "parse_sigmas",
    "preset_from_metadata",
    "preset_to_metadata",
    "resample",
    "sample_euler",
    "sample_renoise",
    "shift_from_mu",
    "uniform",
    "without_preset",
]
