"""The benchmark's report: what it says of times that are known."""

from xml.etree import ElementTree

import pytest
from fewstep.bench import cache, chart, decode, distilled, encode, growth, table

TURNS = [
    {"fewstep": 1.0, "host": 3.0},
    {"fewstep": 2.0, "host": 5.0},
    {"fewstep": 1.0, "host": 4.0},
]
LORAS = [{"0": 1.0, "1": 1.1, "4": 1.2}, {"0": 2.0, "1": 2.0, "4": 2.8}]


def result():
    ours = {"load": 0.5, "step": 1.5, "bytes": 1_000_000_000, "device_bytes": 250_000_000}
    host = {"load": 1.5, "step": 2.0, "bytes": 2_500_000_000, "device_bytes": 0}
    slow = {"fewstep": ours, "host": host | {"load": 2.5}}
    first = {"turns": [{"fewstep": ours, "host": host}, slow], "cold": True}
    return {
        "setting": {"device": "cpu", "threads": 2},
        "steps": [{"type": "Q6_K", "pixels": 256, "turns": TURNS}],
        "first": [{"type": "Q6_K", "pixels": 256} | first],
        "loras": [{"type": "Q6_K", "pixels": 256, "side": "fewstep", "turns": LORAS}],
        "rates": {"copy": [4.0, 5.0, 6.0], "Q6_K": [9.0, 10.0, 11.0]},
    }


def test_ratios_are_taken_within_a_turn():
    """So a turn that was slow for both sides does not show in them."""
    assert table.ratio(TURNS, "host", "fewstep") == "3.00 (2.50–4.00)"
    assert table.medians(TURNS) == {"fewstep": 1.0, "host": 4.0}


def test_report_has_a_row_for_each_measurement():
    text = table.report(result())
    for row in (
        "| Q6_K | 256² | ComfyUI, unquantised | 4.00 s | 3.00 (2.50–4.00) |",
        "| Q6_K | 256² | cold | FewStep | 0.5 s | 2.0 s |  | 1.2 GB |  |",
        "| Q6_K | 256² | cold | ComfyUI, unquantised | 2.0 s | 4.0 s | 2.00 (1.75–2.25) "
        "| 2.5 GB | 2.00 (2.00–2.00) |",
        "| Q6_K | 256² | FewStep | 1.50 s | 1.05 (1.00–1.10) | 1.30 (1.20–1.40) |",
        "| Q6_K | 10.00 | 9.00–11.00 | 2.00 |",
    ):
        assert row in text


def test_report_leaves_out_what_was_not_measured():
    text = table.report(result() | {"loras": [], "first": []})
    assert "LoRA" not in text and "memory" not in text and "A sampling step" in text


def test_report_of_a_text_encoder():
    header = [{"fewstep": 0.004, "gguf-py": 1.2}, {"fewstep": 0.004, "gguf-py": 1.6}]
    result = {"setting": {"device": "cpu"}, "tokens": 77, "type": "Q4_K"}
    turns = [{"fewstep": 2.0, "peer-gguf": 20.0}]
    text = encode.report(result | {"header": header, "encode": turns})
    for row in (
        "## Encoding 77 tokens, Q4_K",
        "| city96/ComfyUI-GGUF | 20 s | 10.00 (10.00–10.00) |",
        "| FewStep | 4 ms |  |",
        "| gguf-py | 1.4e+03 ms | 350.00 (300.00–400.00) |",
    ):
        assert row in text


def test_report_of_a_vae():
    turns = [{"fewstep": 2.0, "host": 9.0}]
    rows = [{"vae": "SD3", "pixels": 512, "way": "decode", "turns": turns}]
    text = decode.report({"setting": {"device": "cpu"}, "rows": rows})
    for row in (
        "| SD3 | 512² | latent to picture | FewStep | 2.000 s |  |",
        "| SD3 | 512² | latent to picture | ComfyUI, Load VAE | 9.000 s | 4.50 (4.50–4.50) |",
    ):
        assert row in text


def test_report_of_a_student_and_its_teacher():
    def spent(*seconds):
        return dict(zip(distilled.PARTS, seconds, strict=True))

    turns = [
        {"teacher": spent(2.0, 90.0, 4.0), "student": spent(1.0, 3.0, 4.0)},
        {"teacher": spent(2.0, 190.0, 8.0), "student": spent(1.0, 3.0, 6.0)},
    ]
    rows = [{"pixels": 512, "turns": turns}]
    text = distilled.report({"setting": {"device": "cpu"}, "type": "Q6_K", "rows": rows})
    for row in (
        "| 512² | teacher | 50 | 4.5 | 2.00 s | 140.00 s | 6.00 s | 148.00 s "
        "| 16.00 (12.00–20.00) |",
        "| 512² | student | 4 | 1 | 1.00 s | 3.00 s | 5.00 s | 9.00 s |  |",
    ):
        assert row in text


def drawn(svg):
    """Words and shapes of a picture, by tag."""
    found = {}
    for element in ElementTree.fromstring(svg).iter():
        found.setdefault(element.tag.rpartition("}")[2], []).append(element)
    return found


def test_bars_are_as_long_as_the_times():
    told = result() | {"setting": {"processor": "A & B", "threads": 2}}
    shapes = drawn(chart.bars(told))
    lengths = [float(bar.get("width")) for bar in shapes["rect"]]
    assert [round(length / lengths[0], 3) for length in lengths] == [1.0, 4.0]
    words = [element.text for element in shapes["text"]]
    assert "FewStep" in words and "4.00 s  (3.00)" in words and "A & B, 2 threads" in words


def test_growth_draws_each_side_by_tokens_and_by_batch():
    def row(pixels, batch, *seconds):
        turns = [dict(zip(("fewstep", "host"), seconds, strict=True))]
        return {"pixels": pixels, "batch": batch, "tokens": growth.tokens(pixels), "turns": turns}

    rows = [row(256, 1, 1.0, 2.0), row(512, 1, 4.0, 6.0), row(256, 2, 1.5, 3.0)]
    by_tokens = growth.series(growth.by_tokens(rows), "tokens")
    assert by_tokens == {"fewstep": {333: 1.0, 1101: 4.0}, "host": {333: 2.0, 1101: 6.0}}
    by_batch = growth.series(growth.by_batch(rows), "batch")
    assert by_batch == {"fewstep": {1: 1.0, 2: 0.75}, "host": {1: 2.0, 2: 1.5}}
    shapes = drawn(chart.lines("title", "tokens", by_tokens))
    assert len(shapes["polyline"]) == 2 and len(shapes["circle"]) == 4
    heights = [float(circle.get("cy")) for circle in shapes["circle"]]
    assert heights[0] > heights[2] and heights[1] > heights[3]  # less time lies lower
    text = growth.report({"setting": {"device": "cpu"}, "type": "Q6_K", "rows": rows})
    assert "| 256² | 2 | 666 | ComfyUI, unquantised | 3.00 s | 2.00 (2.00–2.00) |" in text


@pytest.mark.skipif(not cache.CAN_FORGET, reason="no call for it")
def test_a_file_out_of_the_cache_and_in_it_is_the_same(tmp_path):
    (tmp_path / "f").write_bytes(b"content")
    for take in (cache.forget, cache.remember):
        take(tmp_path / "f")
        assert (tmp_path / "f").read_bytes() == b"content"
