"""The report of a study: the table's numbers, what the summary says for which numbers, and files that work."""

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from msad.experiments.report import format_table, markdown_table, write_report
from msad.experiments.report.rows import KINDS, rows_of
from msad.experiments.report.summary import difference, summary
from msad.experiments.report.tables import table


def row(ap, seconds=60.0, **extra):
    box = {"AP": ap, "AP50": 1.5 * ap, "AP75": ap, "APs": 0.5 * ap, "APm": ap, "APl": float("nan")}
    return {"bbox": box, "seconds": seconds, "iterations": 1000, "per_seed": [ap], **extra}


def seeded(*values):
    mean = float(np.mean(values))
    return row(mean, per_seed=list(values), std={"bbox": float(np.std(values, ddof=1))})


def cost(total, ms):
    return {"gmacs": {"bottom_up": total / 2, "neck": 0.0, "head": total / 2, "total": total}, "ms": {"total": ms}}


@pytest.fixture
def metrics():
    """One seed, rows out of order."""
    return {
        "engine": "detectron2 0.6",
        "seconds": 3725.0,
        "command": "python tools/quickstart.py --seeds 0",
        "data": {"name": "synthetic scenes", "images_train": 1200, "images_val": 200, "instances_train": 7000},
        "versions": {"torch": "2.12.0", "python": "3.11"},
        "seeds": [0],
        "results": {
            "student_L": row(36.0),
            "something_new": row(12.5),
            "baseline_L": row(30.0),
            "baseline_L_shifted": row(32.5),
            "baseline_H": row(40.0, seconds=100.4),
            "student_L_control": row(35.2),
            "baseline_L_time": row(33.5),
            "student_L_w0.1": row(35.5),
            "student_L_scratch": row(34.0),
            "teacher_H": row(41.0),
        },
        "cost": {
            "baseline_H": cost(10.0, 30.0),
            "baseline_L": cost(2.5, 8.0),
            "baseline_L_shifted": cost(5.0, 16.0),
            "student_L": cost(5.0, 15.0),
        },
    }


def three_seeds(student, control):
    results = {
        "baseline_H": seeded(40.0, 40.2, 40.1),
        "baseline_L_shifted": seeded(32.0, 32.2, 32.1),
        "student_L_control": seeded(*control),
        "student_L": seeded(*student),
    }
    return {"seeds": [0, 1, 2], "results": results}


def cell(metrics, name, column):
    headers, cells = table(metrics)
    return next(line for line in cells if line[0] == name)[headers.index(column)]


class Page(HTMLParser):
    """What a browser would find: table cells, sources of pictures, references, text."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.links, self.open, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(attrs["src"])
            assert attrs["alt"]
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            # the second line of a row's head is its title
            self.rows[-1][-1] += "" if "small" in self.open else data


# --- rows and table ---------------------------------------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_method_and_unknown_ones_last(metrics):
    assert [r.name for r in rows_of(metrics)] == [
        "baseline_H", "baseline_L", "baseline_L_shifted", "baseline_L_time", "teacher_H", "student_L_control",
        "student_L", "student_L_w0.1", "student_L_scratch", "something_new",
    ]  # fmt: skip


def test_every_known_row_is_described():
    names = [kind.pattern.replace(".*", "2") for kind in KINDS]
    rows = rows_of({"results": {name: row(1.0) for name in reversed(names)}})
    assert [r.name for r in rows] == names
    assert all(len(r.description) > 60 and r.title for r in rows)
    assert len({r.description for r in rows}) == len(rows)


def test_table_has_the_numbers_of_the_study(metrics):
    headers, cells = table(metrics)
    assert headers == [
        "model", "AP", "AP50", "APs", "APm", "of baseline_H", "iterations", "train s", "GMACs", "ms"
    ]  # fmt: skip
    assert len(cells) == 10 and all(len(line) == len(headers) for line in cells)
    assert cell(metrics, "student_L", "AP") == "36.0" and cell(metrics, "student_L", "AP50") == "54.0"
    assert cell(metrics, "student_L", "APs") == "18.0" and cell(metrics, "student_L", "of baseline_H") == "90 %"
    assert cell(metrics, "baseline_H", "train s") == "100" and cell(metrics, "baseline_H", "iterations") == "1000"
    assert cell(metrics, "student_L", "GMACs") == "5.00 (0.50x)" and cell(metrics, "student_L", "ms") == "15.0"
    assert cell(metrics, "baseline_L", "GMACs") == "2.50 (0.25x)"
    assert cell(metrics, "student_L_scratch", "GMACs") == "-"


def test_share_refers_to_the_teacher_without_a_baseline_and_to_nothing_without_both(metrics):
    del metrics["results"]["baseline_H"]
    assert cell(metrics, "student_L", "of teacher_H") == "88 %"
    assert cell(metrics, "student_L", "GMACs") == "5.00"
    del metrics["results"]["teacher_H"]
    assert not [header for header in table(metrics)[0] if header.startswith("of ")]


def test_spread_over_seeds_is_in_the_table():
    metrics = three_seeds((36.0, 36.5, 36.1), (35.0, 35.5, 35.1))
    assert cell(metrics, "student_L", "AP") == "36.2 ± 0.3"
    del metrics["results"]["student_L"]["std"]
    assert cell(metrics, "student_L", "AP") == "36.2 ± 0.3"


def test_other_tasks_get_columns(metrics):
    metrics["results"]["student_L"]["segm"] = {"AP": 22.25}
    metrics["results"]["student_L"]["keypoints"] = {"AP": 11.0}
    metrics["results"]["student_L"]["std"] = {"bbox": 3.0, "segm": 0.72}
    assert cell(metrics, "student_L", "mask AP") == "22.2 ± 0.7" and cell(metrics, "student_L", "keypoint AP") == "11.0"
    assert cell(metrics, "baseline_H", "mask AP") == "-"


def test_few_classes_get_columns(metrics):
    metrics["results"]["student_L"]["bbox"] |= {"AP-car": 50.0, "AP-bus": 2.0, "AP-tram": float("nan")}
    headers, cells = table(metrics)
    student = next(line for line in cells if line[0] == "student_L")
    assert student[headers.index("AP car")] == "50.0" and student[headers.index("AP bus")] == "2.0"
    assert "AP tram" not in headers  # no object of it: nothing to see
    del metrics["results"]["student_L"]["bbox"]["AP-bus"]
    assert "AP car" not in table(metrics)[0]  # a single class is the AP itself
    metrics["results"]["student_L"]["bbox"] |= {f"AP-{number}": 1.0 for number in range(6)}
    assert not [title for title in table(metrics)[0] if title.startswith("AP ")]  # too many to read


def test_processor_time_is_shown_where_it_is_known(metrics):
    assert "cpu s" not in table(metrics)[0]
    metrics["results"]["student_L"]["cpu_seconds"] = 51.6
    headers, cells = table(metrics)
    assert [line[headers.index("cpu s")] for line in cells if line[0] == "student_L"] == ["52"]


def test_markdown_and_terminal_tables_agree(metrics):
    metrics["results"]["a|b"] = row(1.0)
    headers, cells = table(metrics)
    lines = markdown_table(metrics).splitlines()
    assert len(lines) == len(cells) + 2
    parsed = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert parsed[0] == headers
    assert parsed[2:] == [["`" + line[0].replace("|", r"\|") + "`", *line[1:]] for line in cells]
    terminal = format_table(metrics).splitlines()
    assert re.split(r"\s{2,}", terminal[2].strip()) == cells[0]


def test_tables_of_nothing():
    assert table({})[1] == [] and "AP" in markdown_table({}) and "AP" in format_table({"results": {}})


# --- summary ----------------------------------------------------------------------------------------------------------


def test_summary_states_each_step_with_its_numbers(metrics):
    sentences = summary(metrics)
    assert len(sentences) == 5
    headline, shift, aligned, distillation, evidence = sentences
    assert "36.0 AP, 90 % of the 40.0 AP of baseline_H" in headline
    assert "0.50 times its multiply-adds" in headline and "(15.0 against 30.0 ms)" in headline
    assert "2.5 AP above" in shift and "2.00 times the multiply-adds" in shift
    assert "2.7 AP above baseline_L_shifted" in aligned and "1.7 AP above baseline_L_time" in aligned
    assert "0.8 AP above student_L_control" in distillation
    assert "one seed, which is not evidence" in evidence


def test_one_seed_is_never_called_help(metrics):
    metrics["results"]["student_L"] = row(50.0)
    sentence = summary(metrics)[3]
    assert "14.8 AP above" in sentence and "(one run)" in sentence and "helped" not in sentence


@pytest.mark.parametrize("ap, relation", [(34.9, "0.3 AP below"), (35.2, "level, to a tenth of an AP, with")])
def test_summary_says_when_distillation_did_not_help(metrics, ap, relation):
    metrics["results"]["student_L"] = row(ap)
    sentence = summary(metrics)[3]
    assert sentence.startswith("Distillation itself did not help here:") and relation in sentence


@pytest.mark.parametrize(
    "student, verdict, count",
    [
        ((36.0, 36.5, 36.1), "Distillation itself helped: student_L is 1.0 AP above", "3 of them"),
        ((34.0, 34.5, 34.1), "Distillation itself did not help, it cost accuracy: student_L is 1.0", "0 of them"),
        ((36.0, 35.0, 34.9), "Distillation itself has no effect that this study can show: ", "1 of them"),
        ((35.0, 35.5, 35.1), "Distillation itself has no effect that this study can show: ", "0 of them"),
    ],
)
def test_three_seeds_decide(student, verdict, count):
    sentences = summary(three_seeds(student, (35.0, 35.5, 35.1)))
    sentence = next(s for s in sentences if s.startswith("Distillation"))
    assert sentence.startswith(verdict) and f"over 3 seeds, higher in {count}" in sentence
    assert "mean of 3 seeds" in sentences[-1]


def test_two_seeds_are_too_few():
    metrics = three_seeds((36.0, 36.5), (35.0, 35.5))
    metrics["seeds"] = [0, 1]
    sentences = summary(metrics)
    assert "too few" in sentences[-1]
    assert not any("helped" in sentence for sentence in sentences)


def test_aligned_training_is_compared_with_the_better_of_the_equal_budgets(metrics):
    metrics["results"]["baseline_L_2x"] = row(35.9)
    assert "0.7 AP below baseline_L_2x" in summary(metrics)[2]


def test_summary_of_partial_studies(metrics):
    only = {name: metrics["results"][name] for name in ("baseline_L", "baseline_L_shifted")}
    sentences = summary({"results": only})
    assert "no student_L" in sentences[0] and len(sentences) == 3
    assert "multiply-adds" not in sentences[1]
    assert summary({"results": {"student_L": row(30.0)}})[0].endswith("reaches 30.0 AP.")
    assert summary({}) == ["No model of this study has been evaluated yet."]
    assert summary({"results": {"student_L": {"bbox": {"AP": float("nan")}}}}) == summary({})


def test_seeds_are_paired():
    rows = {r.name: r for r in rows_of(three_seeds((36.0, 39.0, 33.0), (35.0, 38.0, 32.0)))}
    paired = difference(rows["student_L"], rows["student_L_control"])
    assert paired.mean == pytest.approx(1.0) and paired.spread == pytest.approx(0.0)
    assert paired.seeds == paired.positive == 3 and paired.is_evidence


def test_without_values_per_seed_the_spreads_are_combined():
    metrics = three_seeds((36.0, 36.5, 36.1), (35.0, 35.5, 35.1))
    for name, std in (("student_L", 0.3), ("student_L_control", 0.4)):
        metrics["results"][name]["std"] = {"bbox": std}
        del metrics["results"][name]["per_seed"]
    rows = {r.name: r for r in rows_of(metrics)}
    combined = difference(rows["student_L"], rows["student_L_control"], seeds=3)
    assert combined.spread == pytest.approx(0.5) and combined.seeds == 3 and combined.positive is None


# --- files ------------------------------------------------------------------------------------------------------------


def test_report_files(metrics, tmp_path):
    before = copy.deepcopy(metrics)
    for name in ("curves.png", "panels.png", "panels_2.jpg", "unrelated.png"):
        assert cv2.imwrite(str(tmp_path / name), np.zeros((10, 10, 3), np.uint8))
    path = write_report(metrics, tmp_path)
    assert path == tmp_path / "report.html" and str(metrics) == str(before)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    headers, cells = table(metrics)
    assert page.rows == [headers, *cells]
    assert page.images == ["results.png", "ap_vs_gmacs.png", "ap_vs_ms.png", "curves.png", "panels.png", "panels_2.jpg"]
    for link in page.links:
        assert (tmp_path / link).is_file()
    assert "://" not in text  # nothing from the network
    assert "width=device-width" in text
    shown = " ".join(page.text)
    for fact in (*summary(metrics), metrics["command"], "torch 2.12.0", "1,200 training images", "1 h 2 min"):
        assert fact in shown
    assert 'class="student result"' in text


def test_markdown_report_has_the_same_table(metrics, tmp_path):
    write_report(metrics, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert markdown_table(metrics) in text and metrics["command"] in text
    assert all(sentence in text for sentence in summary(metrics))
    for file in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / file).is_file()
    assert cv2.imread(str(tmp_path / "results.png")).shape[1] > 600


def test_names_are_escaped(metrics, tmp_path):
    metrics["results"]["<b>bold</b>&"] = row(3.0)
    metrics["command"] = "run <x> && y"
    text = write_report(metrics, tmp_path).read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;bold&lt;/b&gt;&amp;" in text and "run &lt;x&gt; &amp;&amp; y" in text


@pytest.mark.parametrize(
    "partial",
    [
        {},
        {"results": {}},
        {"results": {"student_L": row(30.0)}},
        {"results": {"student_L": {"bbox": {"AP": float("nan")}}}},
        {"results": {"student_L": {}}, "cost": {"student_L": {}}, "data": {"name": "few"}},
        {"results": {"baseline_H": row(0.0), "student_L": row(0.0)}, "cost": {"baseline_H": cost(0.0, 0.0)}},
    ],
)
def test_missing_parts_do_not_break_the_report(partial, tmp_path: Path):
    text = write_report(partial, tmp_path / "deep" / "er").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.rows) == 1 + len(partial.get("results", {}))
    assert (tmp_path / "deep" / "er" / "report.md").is_file()
