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
        for name, time in exact_medians(row["turns"]).items()
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
    left_out = name == OURS or OURS not in row["turns"][0]
    return "" if left_out else ratio(row["turns"], name, OURS)


def first_picture(run: dict) -> float:
    return run["load"] + run["step"]


def peak_memory(run: dict) -> float:
    """Of the process and of the device, in bytes."""
    return run["bytes"] + run["device_bytes"]


def of_first(turns: list[dict], number) -> list[dict[str, float]]:
    """One number of each side's run, turn by turn."""
    return [{name: number(run) for name, run in turn.items()} for turn in turns]


def first_and_memory(result: dict) -> list[str]:
    body = []
    for row in result["first"]:
        seconds, memory = (of_first(row["turns"], f) for f in (first_picture, peak_memory))
        loads = exact_medians(of_first(row["turns"], lambda run: run["load"]))
        for name, median_seconds in exact_medians(seconds).items():
            place = [row["type"], f"{row['pixels']}²", "cold" if row["cold"] else "warm"]
            times = [f"{loads[name]:.1f} s", f"{median_seconds:.1f} s"]
            gigabytes = f"{exact_medians(memory)[name] / 1e9:.1f} GB"
            compared = [against({"turns": each}, name) for each in (seconds, memory)]
            body.append([*place, LABELS[name], *times, compared[0], gigabytes, compared[1]])
    ours = "Times ours (least–most)"
    head = ["Type", "Picture", "File", "Side", "Load", "First step done", ours, "Peak memory", ours]
    return [
        *rows(head, body),
        "",
        "Cold: the files are not in the system's cache. Pages of mapped files count as memory; "
        "stable-diffusion.cpp holds text encoders and a VAE, too.",
    ]


def loras(result: dict) -> list[str]:
    counts = list(result["loras"][0]["turns"][0])
    body = [
        [
            row["type"],
            f"{row['pixels']}²",
            LABELS[row["side"]],
            f"{exact_medians(row['turns'])['0']:.2f} s",
        ]
        + [ratio(row["turns"], count, "0") for count in counts[1:]]
        for row in result["loras"]
    ]
    return rows(
        ["Type", "Picture", "Side", "None", *(f"{n}, times none" for n in counts[1:])], body
    )


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
