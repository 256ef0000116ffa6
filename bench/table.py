"""Results as a text: medians, and ratios to this project with their spread."""

from statistics import median

OURS = "fewstep"
LABELS = {
    "fewstep": "FewStep",
    "runtime": "FewStep, runtime format",
    "host": "ComfyUI, unquantised",
    "peer-gguf": "city96/ComfyUI-GGUF",
    "cpp": "stable-diffusion.cpp",
}


def exact_medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(turn[name] for turn in turns) for name in turns[0]}


def medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in exact_medians(turns).items()}


def ratio(turns: list[dict[str, float]], name: str, to: str) -> str:
    """'2.51 (2.40–2.66)': median, least and most of the ratios within each turn."""
    each = [turn[name] / turn[to] for turn in turns]
    return f"{median(each):.2f} ({min(each):.2f}–{max(each):.2f})"


def rows(head: list[str], body: list[list[str]]) -> list[str]:
    rule = ["---"] * len(head)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *body)]


def report(result: dict) -> str:
    """The whole result in markdown."""
    told = result["setting"]
    lines = ["# Speed", "", "; ".join(f"{key} {value}" for key, value in told.items() if value)]
    body = [
        [row["type"], f"{row['pixels']}²", LABELS[name], f"{time:.2f} s", against(row, name)]
        for row in result["steps"]
        for name, time in medians(row["turns"]).items()
    ]
    head = ["Type", "Picture", "Side", "A step", "Times ours (least–most)"]
    lines += ["", "## A sampling step", "", *rows(head, body)]
    if result["first"]:
        lines += ["", "## File to first step, and memory", "", *first_and_memory(result)]
    if result["loras"]:
        lines += ["", "## LoRAs of rank 16 on every block", "", *loras(result)]
    lines += ["", "## Dequantising to bfloat16", "", *rates(result["rates"])]
    return "\n".join(lines)


def against(row: dict, name: str) -> str:
    return "" if name == OURS else ratio(row["turns"], name, OURS)


def first_and_memory(result: dict) -> list[str]:
    body = []
    for row in result["first"]:
        sizes = [f"{row[key] / 1e9:.1f} GB" for key in ("bytes", "device_bytes") if row[key]]
        times = [f"{row['load']:.1f} s", f"{row['load'] + row['first_step']:.1f} s"]
        place = [row["type"], f"{row['pixels']}²", LABELS[row["side"]]]
        body.append([*place, *times, " + ".join(sizes)])
    head = ["Type", "Picture", "Side", "Load", "Load and first step", "Peak memory"]
    return [*rows(head, body), "", "stable-diffusion.cpp holds text encoders and a VAE, too."]


def loras(result: dict) -> list[str]:
    counts = list(result["loras"][0]["turns"][0])
    body = [
        [row["type"], LABELS[row["side"]], f"{medians(row['turns'])['0']:.2f} s"]
        + [ratio(row["turns"], count, "0") for count in counts[1:]]
        for row in result["loras"]
    ]
    return rows(["Type", "Side", "None", *(f"{n}, times none" for n in counts[1:])], body)


def rates(rate: dict[str, list[float]]) -> list[str]:
    copy = median(rate["copy"])
    body = [
        [
            name,
            f"{median(each):.2f}",
            f"{min(each):.2f}–{max(each):.2f}",
            f"{median(each) / copy:.2f}",
        ]
        for name, each in rate.items()
    ]
    return rows(["Type", "10⁹ weights a second", "least–most", "of a copy from float32"], body)
