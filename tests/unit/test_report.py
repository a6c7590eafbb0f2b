"""The report room: tables read as strings, the picture's size, and a page that is whole, escaped and atomic."""

import base64
import copy
import json
import re
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from cvlm.errors import CvlmError
from cvlm.report import draw_arms, result_table, write_report
from cvlm.report.tables import baseline_table, comparison_table, cost_table, environment_table

METRICS = {
    "task": "vqa",
    "split": "val",
    "n": 1586,
    "metric": "vqa_accuracy",
    "arms": {
        "majority": {"vqa_accuracy": {"mean": 0.312, "per_seed": [0.312], "ci95": [0.29, 0.334]}},
        "teacher": {"vqa_accuracy": {"mean": 0.62, "per_seed": [0.62], "ci95": [0.6, 0.64]}},
        "finetune": {
            "vqa_accuracy": {"mean": 0.44, "per_seed": [0.43, 0.44, 0.45], "ci95": [0.42, 0.46]},
            "exact": {"mean": 0.4, "per_seed": [0.4, 0.4, 0.4], "ci95": [0.39, 0.41]},
        },
        "distill": {"vqa_accuracy": {"mean": 0.485, "per_seed": [0.48, 0.485, 0.49], "ci95": [0.47, 0.5]}},
    },
    "comparisons": {
        "distill_vs_finetune": {
            "metric": "vqa_accuracy",
            "difference": 0.045,
            "ci95": [0.021, 0.069],
            "p_value": 0.0004,
        },
        "finetune_vs_teacher": {
            "metric": "vqa_accuracy",
            "difference": -0.18,
            "ci95": [-0.2, -0.16],
            "p_value": 0.0004,
        },
        "distill_vs_chain": {"metric": "vqa_accuracy", "difference": 0.001, "ci95": [-0.01, 0.01], "p_value": 0.83},
    },
    "verdict": "distill is higher than finetune & <done>",
}
PHASE = {
    "flops": 3.3e13,
    "seconds": 200.0,
    "device_seconds": 7200.0,
    "energy_joules": 5040.0,
    "energy_source": "estimated",
    "peak_memory_bytes": 3 * 2**29,
    "samples": 20000,
}
COST = {
    "phases": {"teacher": {**PHASE, "flops": 2.1e15}, "finetune": PHASE, "distill": {**PHASE, "energy_joules": None}},
    "total": PHASE,
    "baselines": [
        {
            "name": "ViLT pretraining",
            "kind": "published",
            "device_hours": 4608,
            "flops": None,
            "ratio_flops": None,
            "ratio_device_hours": 0.00021,
            "source": "https://arxiv.org/abs/2102.03334",
            "assumptions": "64 V100, 3 days",
        },
        {"name": "trap", "kind": "measured", "source": "javascript:alert(1)", "assumptions": '"><img src=x>'},
    ],
}
ENVIRONMENT = {"python": "3.11.9", "packages": {"torch": "2.15.0"}, "command": ["cvlm", "run"], "commit": None}
RECIPE = "task: vqa  # </pre><script>alert(1)</script>\n"


@pytest.fixture
def run_dir(tmp_path):
    for name, content in (("metrics", METRICS), ("cost", COST), ("environment", ENVIRONMENT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


class Page(HTMLParser):
    """Collects what the tests ask about: tags, what they load, rows of tables, and all text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.loads, self.links, self.rows, self.text = [], [], [], [], ""
        self.in_cell = False
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if "src" in attributes:
            self.loads.append(attributes["src"])
        if "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def test_result_table():
    table = result_table(METRICS)
    assert table.header == ("arm", "vqa_accuracy", "95 % interval", "per seed", "points vs finetune")
    assert table.rows == (
        ("majority", "31.2 %", "29.0 to 33.4 %", "1 seed", "-"),
        # Stored as finetune_vs_teacher, so it is turned.
        ("teacher", "62.0 %", "60.0 to 64.0 %", "1 seed", "+18.00 (+16.00 to +20.00)"),
        ("finetune", "44.0 %", "42.0 to 46.0 %", "43.0 to 45.0 % (3 seeds)", "-"),
        ("distill", "48.5 %", "47.0 to 50.0 %", "48.0 to 49.0 % (3 seeds)", "+4.50 (+2.10 to +6.90)"),
    )


def test_result_table_of_another_metric_lists_the_arms_that_have_it():
    assert result_table(METRICS, "exact").rows == (
        ("finetune", "40.0 %", "39.0 to 41.0 %", "40.0 to 40.0 % (3 seeds)", "-"),
    )


def test_the_first_metric_is_primary_where_none_is_named():
    metrics = {key: value for key, value in METRICS.items() if key != "metric"}
    assert result_table(metrics) == result_table(METRICS)


def test_comparison_table():
    assert [row[0] + ": " + row[-1] for row in comparison_table(METRICS).rows] == [
        "distill vs finetune: higher",
        "finetune vs teacher: lower",
        "distill vs chain: not shown",
    ]
    assert comparison_table(METRICS).rows[0][2:5] == ("+4.50", "+2.10 to +6.90", "< 0.001")


def test_cost_table():
    rows = {row[0]: row[1:] for row in cost_table(COST).rows}
    assert list(rows) == ["teacher", "finetune", "distill", "total"]
    assert rows["finetune"] == ("3.30e+13", "3.3 min", "2.0 h", "1.4 Wh (estimated)", "1.50 GiB", "20,000")
    assert rows["distill"][3] == "-"


def test_baseline_and_environment_tables():
    vilt, trap = baseline_table(COST).rows
    assert vilt[2:6] == ("-", "-", "4,608", "1/4,760")
    assert trap[2:6] == ("-", "-", "-", "-")
    assert environment_table(ENVIRONMENT).rows == (
        ("python", "3.11.9"),
        ("packages.torch", "2.15.0"),
        ("command", "cvlm, run"),
        ("commit", "-"),
    )


def test_metrics_without_the_primary_metric_are_refused():
    with pytest.raises(CvlmError, match="no arm with the metric 'recall'"):
        result_table({**METRICS, "metric": "recall"})
    with pytest.raises(CvlmError, match="Arms: none"):
        result_table({"arms": {}})


def test_picture(tmp_path):
    had_pyplot = "matplotlib.pyplot" in sys.modules
    draw_arms(METRICS, COST, tmp_path / "arms.png")
    with Image.open(tmp_path / "arms.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1600, 700))
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "the picture is empty"
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
    assert [path.name for path in tmp_path.iterdir()] == ["arms.png"]


def test_picture_of_the_least_there_can_be(tmp_path):
    arms = {"distill_$x_1": {"accuracy_$y": {"mean": 0.0, "per_seed": [], "ci95": None}}}
    draw_arms({"task": "$t", "arms": arms}, {}, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 1000


def test_many_arms_make_the_picture_taller(tmp_path):
    metrics = copy.deepcopy(METRICS)
    metrics["arms"] |= {f"chain{step}": metrics["arms"]["distill"] for step in range(8)}
    draw_arms(metrics, COST, tmp_path / "arms.png")
    with Image.open(tmp_path / "arms.png") as picture:
        assert picture.size[0] == 1600
        assert picture.size[1] > 1300


def test_page_is_one_file_that_loads_nothing(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    (source,) = page.loads
    embedded = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert embedded == (run_dir / "arms.png").read_bytes()
    assert Image.open(BytesIO(embedded)).size == (1600, 700)
    assert page.links == ["https://arxiv.org/abs/2102.03334"]
    assert "link" not in page.tags
    assert not re.search(r"@import|url\(", content)
    assert "prefers-color-scheme: dark" in content


def test_page_shows_every_table(run_dir):
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    for table in (
        result_table(METRICS),
        result_table(METRICS, "exact"),
        comparison_table(METRICS),
        cost_table(COST),
        environment_table(ENVIRONMENT),
    ):
        for row in (table.header, *table.rows):
            assert list(row) in page.rows
    for row in baseline_table(COST).rows:
        assert list(row[:6]) in page.rows
        # The sources and assumptions are prose, and stand below the table.
        assert row[6] in page.text
        assert row[7] in page.text
    assert METRICS["verdict"] in page.text
    assert RECIPE in page.text


def test_page_escapes_what_it_is_given(run_dir):
    content = write_report(run_dir).read_text(encoding="utf-8")
    assert "script" not in Page(content).tags
    assert Page(content).tags.count("img") == 1
    assert "finetune &amp; &lt;done&gt;" in content


def test_page_without_comparisons_or_baselines(run_dir):
    metrics = {key: value for key, value in METRICS.items() if key not in ("comparisons", "verdict")}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    (run_dir / "cost.json").write_text("{}")
    content = write_report(run_dir).read_text(encoding="utf-8")
    assert "No comparison was made." in content
    assert content.count('<p class="none">None.</p>') == 4


@pytest.mark.parametrize("name", ["metrics.json", "cost.json", "environment.json", "recipe.yaml"])
def test_a_missing_file_is_named(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(CvlmError, match=rf"{re.escape(name)} is missing.*cvlm run RECIPE.yaml"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[1]", "must hold a JSON object, not a list")]
)
def test_a_broken_file_is_named(run_dir, content, message):
    (run_dir / "cost.json").write_text(content)
    with pytest.raises(CvlmError, match=rf"cost\.json.*{message}"):
        write_report(run_dir)


def test_a_crash_leaves_the_old_page(run_dir, monkeypatch):
    (run_dir / "report.html").write_text("old")
    before = sorted(path.name for path in run_dir.iterdir())

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "old"
    assert sorted(path.name for path in run_dir.iterdir()) == before
