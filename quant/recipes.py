"""Recipes as data: which tensor of a diffusion model gets which type.

A recipe is a base type and rules; a rule names a role that a tensor's name gives it (`ROLES`),
where among its kind it stands (`PLACES`), and the type. The first rule that fits decides, else the
base.
What no recipe quantises stands in `plan.py` and, by architecture, in `architectures.py`.

Source: llama.cpp `llama_tensor_get_type` (the mixes S, M, L) and city96/ComfyUI-GGUF
`tools/lcpp.patch` (which names of diffusion models play which role). The ladder from flash-16 to
flash-4 follows SD3.5-Flash (arXiv 2509.21318: 16 down to 6 bits); which layers the paper keeps
higher is not published, so flash-4's rules are our guess.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType

from .errors import GGUFError
from .types import PLAIN_TYPES, QTYPES

# role -> what the names of such weights end with, in the architectures of `architectures.py`
ROLES: dict[str, re.Pattern[str]] = {
    role: re.compile(rf"(?:^|[._])(?:{ends})\.weight$")
    for role, ends in {
        "value": r"attn_v|to_v|v|w[12]?v|v_proj|add_v_proj",
        "qkv": r"qkv|to_qkv|attn_qkv|qkv_proj",
        "attn_out": r"attn2?\.proj|img_attn\.proj|txt_attn\.proj|to_out\.0|to_add_out|attn\.o|"
        r"attention\.out|attn_o|attn_output|o_proj|out_proj|w[12]?o|SelfAttention\.o",
        "ffn_down": r"ffn_down|ffn\.2|ff\.net\.2|mlp\.layer2|feed_forward\.w2|mlp\.fc2|mlp\.2|"
        r"mlp\.net\.2|experts\.\w+\.w2|w2|c_proj|DenseReluDense\.wo",
        "modulation": r"adaLN_modulation\.\d|img_mod\.\d|txt_mod\.\d|img_mod\.lin|txt_mod\.lin|"
        r"modulation\.lin|mod[XC]\.1|emb_layers\.1",
    }.items()
}

# place -> whether number i of n of the same role stands there; more_bits is llama.cpp's
# `use_more_bits`: the first and last eighth, and every third between.
PLACES: dict[str, Callable[[int, int], bool]] = {
    "all": lambda i, n: True,
    "first two": lambda i, n: i < 2,
    "first four": lambda i, n: i < 4,
    "first sixteenth": lambda i, n: i < n // 16,
    "first eighth": lambda i, n: i < n // 8,
    "more bits": lambda i, n: i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2,
}

# A type whose blocks do not divide a tensor's rows -> the next best (llama.cpp
# `tensor_type_fallback`); where that does not fit either, 16 bits.
FALLBACKS: dict[T, T] = {
    T.Q6_K: T.Q8_0,
    T.Q5_K: T.Q5_1,
    T.Q4_K: T.Q5_0,
    T.NVFP4: T.Q4_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    **dict.fromkeys(
        (T.Q3_K, T.Q2_K, T.IQ4_XS, T.IQ3_S, T.IQ3_XXS, T.IQ2_S, T.IQ2_XS, T.IQ2_XXS, T.IQ1_M,
         T.IQ1_S),
        T.IQ4_NL,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    role: str
    place: str
    qtype: T


@dataclass(frozen=True)
class Recipe:
    """base: the type of ordinary matrices; None for 16 bits, bf16 or f16 as the source has them."""

    name: str
    about: str
    base: T | None
    rules: tuple[Rule, ...] = ()
    file_type: LlamaFileType = LlamaFileType.GUESSED


def _mix(name: str, base: T, about: str, *rules: tuple[str, str, T]) -> Recipe:
    return Recipe(name, about, base, tuple(Rule(*rule) for rule in rules),
                  LlamaFileType["MOSTLY_" + name])  # fmt: skip


_M_MIX = (("value", "more bits", T.Q6_K), ("ffn_down", "more bits", T.Q6_K))

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("flash-16", "16 bits throughout, as the source has them", None),
        Recipe("flash-8", "8 bits, looks the same", T.Q8_0, file_type=LlamaFileType.MOSTLY_Q8_0),
        Recipe("flash-6", "6 bits, hardly to be told apart", T.Q6_K,
               file_type=LlamaFileType.MOSTLY_Q6_K),
        Recipe("flash-4", "4 bits, with 5 and 6 where errors add up (our guess)", T.Q4_K,
               (Rule("value", "all", T.Q6_K), Rule("qkv", "all", T.Q5_K),
                Rule("ffn_down", "more bits", T.Q6_K), Rule("modulation", "all", T.Q5_K)),
               LlamaFileType.MOSTLY_Q4_K_M),
        _mix("Q8_0", T.Q8_0, "8 bits"),
        _mix("Q6_K", T.Q6_K, "6 bits"),
        _mix("Q5_K_M", T.Q5_K, "5 bits, 6 for values and half of the feed-forward's outputs",
             *_M_MIX, ("qkv", "all", T.Q6_K)),
        _mix("Q5_K_S", T.Q5_K, "5 bits"),
        _mix("Q4_K_M", T.Q4_K, "4 bits, 6 for values and half of the feed-forward's outputs",
             *_M_MIX, ("qkv", "all", T.Q5_K)),
        _mix("Q4_K_S", T.Q4_K, "4 bits, 5 in the first layers",
             ("value", "first four", T.Q5_K), ("ffn_down", "first eighth", T.Q5_K)),
        _mix("Q3_K_L", T.Q3_K, "3 bits, 5 for values, attention's and feed-forward's outputs",
             ("value", "all", T.Q5_K), ("ffn_down", "all", T.Q5_K),
             ("attn_out", "all", T.Q5_K), ("qkv", "all", T.Q4_K)),
        _mix("Q3_K_M", T.Q3_K, "3 bits, 4 for values and outputs, 5 in the first layers",
             ("value", "first two", T.Q5_K), ("value", "all", T.Q4_K),
             ("ffn_down", "first sixteenth", T.Q5_K), ("ffn_down", "all", T.Q4_K),
             ("attn_out", "all", T.Q4_K), ("qkv", "all", T.Q4_K)),
        _mix("Q3_K_S", T.Q3_K, "3 bits"),
        _mix("Q2_K", T.Q2_K, "2 bits, 3 for values and outputs",
             ("value", "all", T.Q3_K), ("ffn_down", "all", T.Q3_K), ("attn_out", "all", T.Q3_K)),
        _mix("Q2_K_S", T.Q2_K, "2 bits, 4 in the first feed-forward outputs",
             ("ffn_down", "first eighth", T.Q4_K)),
        _mix("Q5_1", T.Q5_1, "5 bits with minimum"),
        _mix("Q5_0", T.Q5_0, "5 bits"),
        _mix("Q4_1", T.Q4_1, "4 bits with minimum"),
        _mix("Q4_0", T.Q4_0, "4 bits"),
        _mix("IQ4_NL", T.IQ4_NL, "4 bits on uneven levels",
             ("ffn_down", "first eighth", T.Q5_K)),
        _mix("IQ4_XS", T.IQ4_XS, "4 bits on uneven levels, smaller",
             ("ffn_down", "first eighth", T.Q5_K)),
    )
}  # fmt: skip

# The K types of a file of a single type count as ggml's S mix.
_FILE_TYPES = {
    T.F32: LlamaFileType.ALL_F32,
    T.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    T.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    T.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    T.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    T.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
}


def recipe_named(name: str) -> Recipe:
    """Raises: GGUFError with the list of recipes."""
    known = {recipe.lower(): recipe for recipe in RECIPES}
    if name.lower() not in known:
        raise GGUFError(f"no recipe is called {name!r} (known: {', '.join(RECIPES)})")
    return RECIPES[known[name.lower()]]


def type_named(name: str) -> T:
    """Raises: GGUFError with the list of types."""
    names = [qtype.name for qtype in (*PLAIN_TYPES, *QTYPES)]
    if name.upper() not in names:
        raise GGUFError(f"no type is called {name!r} (known: {', '.join(names)})")
    return T[name.upper()]


def recipe_of_type(qtype: T) -> Recipe:
    """One type for every ordinary matrix."""
    file_type = _FILE_TYPES.get(qtype) or getattr(
        LlamaFileType, f"MOSTLY_{qtype.name}", LlamaFileType.GUESSED
    )
    return Recipe(qtype.name, f"{qtype.name} throughout", qtype, (), file_type)


def recipe_or_type(name: str) -> Recipe:
    """A recipe by its name, else the recipe of the type so called. Raises: GGUFError with both."""
    if name.lower() in map(str.lower, RECIPES):
        return recipe_named(name)
    if name.upper() in (qtype.name for qtype in (*PLAIN_TYPES, *QTYPES)):
        return recipe_of_type(type_named(name))
    known = dict.fromkeys([*RECIPES, *(qtype.name for qtype in (*PLAIN_TYPES, *QTYPES))])
    raise GGUFError(f"no recipe or type is called {name!r} (known: {', '.join(known)})")


# Where a size budget chooses the types; until then all matrices count as its ladder's largest.
BY_BUDGET = replace(recipe_of_type(T.Q8_0), name="budget", file_type=LlamaFileType.GUESSED)


def role_of(name: str) -> str | None:
    """The role of the weight `name`, a key of `ROLES`; None for ordinary ones."""
    return next((role for role, pattern in ROLES.items() if pattern.search(name)), None)
