"""The report of a comparison: its numbers, worked out by hand, what it says for which numbers, and files that work."""

import copy
import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from msad.experiments import report
from msad.experiments.judgement import alone_as_long, no_percentages, summary
from msad.experiments.report import write_report
from msad.experiments.rows import check_metric, full_resolution, rows_of, warnings
from msad.experiments.statistics import estimate
from msad.experiments.tables import accuracy_table, class_table, cost_table, format_table, format_tables
from msad.product import card

LONGER = "baseline_L_shifted@equal_iterations"


def runs(variant, *aps, name=None, iterations=1000, warmup=50, **box):
    """The finished runs of a variant, one a seed."""
    return [
        {
            "variant": variant, "seed": seed, "iterations": iterations, "warmup": warmup, "seconds": 100.4,
            "cpu_seconds": 90.0, "steps": iterations,
            "results": {name or variant: {"bbox": {"AP": ap, "AP50": 1.5 * ap, "APl": float("nan"), **box}}},
        }
        for seed, ap in enumerate(aps)
    ]  # fmt: skip


def cost(total, ms):
    return {"gmacs": {"head": total / 2, "total": total}, "ms": {"total": ms}, "input": [64, 96], "parameters": 384568}


@pytest.fixture
def data():
    """One seed of a study, and costs."""
    named = {"baseline_H": 40.0, "baseline_L": 30.0, "baseline_equal_cost": 35.0, "baseline_L_shifted": 32.5,
             LONGER: 33.5, "student_L_no_kd": 35.2, "student_L": 36.0}  # fmt: skip
    found = [run for name, ap in named.items() for run in runs(name, ap)]
    found += runs("teacher", 41.0, name="teacher_H") + runs("teacher", 42.0, name="teacher_fused")
    costs = {"baseline_H": cost(10.0, 30.0), "baseline_L": cost(2.5, 8.0), "baseline_L_shifted": cost(5.0, 16.0),
             "student_L": cost(5.0, 15.0)}  # fmt: skip
    variants = {n: {"file": f"{n}.yaml", "title": f"the {n}", "description": "", "teacher": n == "teacher"}
                for n in ("teacher", *named)}  # fmt: skip
    return {
        "engine": "detectron2 0.6", "seconds": 3725.0, "command": "python tools/quickstart.py --seeds 0",
        "data": {"name": "scenes", "images_train": 1200, "images_val": 200, "instances_train": 7000},
        "versions": {"torch": "2.12.0"}, "seeds": [0], "reference": "", "variants": variants, "runs": found,
        "cost": costs,
    }  # fmt: skip


@pytest.fixture
def seeded():
    """Three seeds of a reference and another variant, and one of a third whose second run failed."""
    found = runs("a", 30.0, 31.0, 32.0) + runs("b", 31.0, 32.5, 32.5) + runs("c", 29.0)
    found.append({"variant": "c", "seed": 1, "error": "FloatingPointError: loss is nan"})
    variants = {n: {"file": f"{n}.yaml", "title": ""} for n in "abc"}
    return {"seeds": [0, 1, 2], "reference": "a", "variants": variants, "runs": found}


def cell(table, name, column):
    headers, cells = table
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
        if tag not in ("img", "meta", "link", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            # the second line of a row's head is its title
            self.rows[-1][-1] += "" if "small" in self.open else data


# --- statistics and tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.30265), (6, 2.57058), (31, 2.04227)])
def test_intervals_follow_the_published_quantiles(n, t):
    values = [30.0 + (-1) ** i for i in range(n)]
    found = estimate(values)
    assert found.half == pytest.approx(t * np.std(values, ddof=1) / n**0.5, rel=1e-5)


def test_interval_by_hand():
    found = estimate([30.0, 32.0, 31.0])
    assert found.mean == 31.0 and found.std == 1.0 and found.n == 3
    assert found.half == pytest.approx(4.30265 / 3**0.5, abs=1e-4) and found.excludes_zero
    assert not estimate([1.0, -0.5, 0.4]).excludes_zero
    alone = estimate([3.0])
    assert alone == (3.0, None, None, 1) and not alone.excludes_zero


def test_what_training_warned_of_is_in_the_report(seeded, tmp_path):
    """Each text once, with the variants and seeds that it is about; of a run that stands for another one, once."""
    for run in seeded["runs"][:4]:
        run["warnings"] = ["weights are <small>"]
    seeded["runs"][0]["warnings"] = ["weights are <small>", "few images"]
    seeded["runs"][1] |= {"same_as": "b", "variant": "a@equal_time"}
    assert warnings(seeded) == ["a, b (seed 0): weights are <small>", "a (seed 0): few images"]
    page = write_report(seeded, tmp_path, "T").read_text()
    assert "<h2>What training warned of</h2><ul><li>a, b (seed 0): weights are &lt;small&gt;</li>" in page
    markdown = (tmp_path / "report.md").read_text()
    assert "## What training warned of\n\n- a, b (seed 0): weights are <small>\n- a (seed 0): few images\n" in markdown
    for run in seeded["runs"]:
        run.pop("warnings", None)
    assert "warned" not in write_report(seeded, tmp_path, "T").read_text()


def test_differences_are_paired_by_seed(seeded):
    a, b, c = rows_of(seeded)
    assert a.estimate().mean == 31.0 and a.estimate().std == 1.0 and a.minus(a) is None
    # Differences 1.0, 1.5, 0.5: mean 1, std 0.5, interval 4.303 * 0.5 / sqrt(3).
    change = b.minus(a)
    assert change.mean == pytest.approx(1.0) and change.half == pytest.approx(1.2421, abs=1e-4)
    assert not change.excludes_zero and c.minus(a).mean == -1.0 and c.minus(a).half is None
    headers, cells = accuracy_table(seeded)
    assert headers == ["model", "AP", "95 % interval", "minus a", "higher in", "AP50"]  # APl is no number
    assert cells[0] == ["a", "31.0 ± 1.0", "28.5 to 33.5", "-", "-", "46.5"]
    assert cells[1][3:5] == ["+1.00 ± 1.24", "3 of 3"] and cells[2][1:5] == ["29.0", "-", "-1.00", "-"]


def test_a_significant_difference_is_starred(seeded):
    seeded["runs"] = runs("a", 30.0, 30.0, 30.0) + runs("b", 31.0, 31.1, 31.2)
    assert cell(accuracy_table(seeded), "b", "minus a") == "+1.10 ± 0.25 *"


def test_tables_have_the_numbers_of_the_study(data):
    accuracy, costs = accuracy_table(data), cost_table(data)
    assert accuracy[0] == ["model", "AP", "of baseline_H", "AP50"]
    assert [line[0] for line in accuracy[1]] == [
        "baseline_H", "baseline_L", "baseline_equal_cost", "baseline_L_shifted", LONGER, "student_L_no_kd", "student_L",
        "teacher_H", "teacher_fused",
    ]  # fmt: skip
    assert cell(accuracy, "student_L", "AP") == "36.0" and cell(accuracy, "student_L", "of baseline_H") == "90 %"
    assert costs[0] == ["model", "iterations", "train s", "CPU s", "input", "parameters", "GMACs", "ms"]
    assert cell(costs, "student_L", "GMACs") == "5 (0.50x)" and cell(costs, "student_L", "ms") == "15.0"
    for run in data["runs"]:  # segmentors have no AP
        run["results"] = {name: {"sem_seg": {"mIoU": 40.0}} for name in run["results"]}
    assert cell(cost_table(data), "student_L", "GMACs") == "5 (0.50x)"
    assert cell(costs, "student_L", "input") == "64x96" and cell(costs, LONGER, "GMACs") == "-"
    assert cell(costs, "student_L", "iterations") == "1000" and cell(costs, "student_L", "train s") == "100"


def test_shares_refer_to_the_teacher_without_a_baseline(data):
    data["runs"] = [r for r in data["runs"] if r["variant"] != "baseline_H"]
    assert cell(accuracy_table(data), "student_L", "of teacher_H") == "88 %"


def test_other_tasks_and_few_classes_get_columns(data):
    (student,) = [r["results"]["student_L"] for r in data["runs"] if r["variant"] == "student_L"]
    student |= {"segm": {"AP": 22.25}, "keypoints": {"AP": 11.0}}
    student["bbox"] |= {"AP-car": 50.0, "AP-bus": 2.0, "AP-tram": float("nan")}
    table = accuracy_table(data)
    assert cell(table, "student_L", "mask AP") == "22.2" and cell(table, "student_L", "keypoint AP") == "11.0"
    assert cell(table, "baseline_H", "mask AP") == "-" and cell(table, "student_L", "AP car") == "50.0"
    assert "AP tram" not in table[0]  # no object of it: nothing to see
    student["bbox"] |= {f"AP-{number}": 1.0 for number in range(6)}
    assert not [title for title in accuracy_table(data)[0] if title.startswith("AP ")]  # too many to read
    assert accuracy_table(data, "segm/AP")[0][:2] == ["model", "AP"]
    with pytest.raises(ValueError, match=r"segm/AR.*bbox/AP50"):
        check_metric(rows_of(data), "segm/AR")


def test_tables_fit_a_page_of_1300_pixels(data):
    """The last column was cut. Sizes are those of the style sheet: digits of 14 px are 8 px wide, names 7.5."""
    seeds = [dict(run, seed=seed) for run in data["runs"] for seed in range(3)]
    for run in seeds:
        for results in run["results"].values():
            results["bbox"] |= dict.fromkeys(("AP75", "APs", "APm", "APl", "AP-disc", "AP-ring", "AP-triangle"), 30.0)
    data |= {"runs": seeds, "seeds": [0, 1, 2], "reference": "student_L_no_kd"}
    for headers, cells in (accuracy_table(data), cost_table(data)):
        width = 4 + 18 + 7.5 * max(len(part) for line in cells for part in line[0].split("@"))
        for i, header in enumerate(headers[1:], 1):
            width += 18 + 8 * max(map(len, [*header.split(), *(line[i] for line in cells)]))
        assert width < 1240 - 40, width


def test_markdown_and_terminal_tables_agree(seeded):
    seeded["runs"] += runs("x|y", 1.0)
    headers, cells = accuracy_table(seeded)
    lines = format_table((headers, cells), "github").splitlines()
    parsed = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert parsed[0] == headers
    assert parsed[2:] == [["`" + line[0].replace("|", r"\|") + "`", *line[1:]] for line in cells]
    assert re.split(r"\s{2,}", format_tables(seeded).splitlines()[2].strip()) == cells[0]


def test_names_of_classes_end_no_cell_and_are_no_html(seeded):
    for run in seeded["runs"]:
        for result in run.get("results", {}).values():
            result["bbox"] |= {"AP-a|b": 10.0, "AP-c": 20.0, "AP-<b>two\nlines": 30.0}
    table = accuracy_table(seeded)
    assert "AP a|b" in table[0] and "AP a|b" in format_table(table, "simple")
    for text in (format_table(table, "github"), card._table(table)):
        assert r"AP a\|b" in text and r"AP \<b>two lines" in text
        assert {len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines()} == {len(table[0]) + 2}


# --- judgement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["", "teacher", "far"], ids=["of earlier versions", "fused", "plain"])
@pytest.mark.parametrize(("r", "share"), [("L", "half"), ("EL", "quarter")])
def test_summary_states_each_step_with_its_numbers(data, tmp_path, r, share, teacher):
    """Whatever the student's resolution and the teacher are."""
    data = json.loads(json.dumps(data).replace("_L", f"_{r}"))
    if teacher:
        data["variants"] |= {name: {**data["variants"][name], "teachers": [teacher]} for name in data["variants"]
                             if name.startswith("student")}  # fmt: skip
    if teacher == "far":
        data["runs"] = [run for run in data["runs"] if run["variant"] != "teacher"] + runs("far", 42.0)
    evidence, headline, shift, init, margin, distillation, budget, equal_cost = summary(data)
    assert evidence.startswith("One seed:")
    assert (
        f"The {share}-resolution student (student_{r}) reaches 36.0 AP, 90 % of the 40.0 AP of baseline_H" in headline
    )
    assert "0.50 times its multiply-adds and 0.50 times its latency" in headline
    assert f"2.5 AP above baseline_{r} (one run), at 2.00 times the multiply-adds" in shift
    assert f"student_{r}_no_kd is 2.7 AP above baseline_{r}_shifted" in init
    assert ("multi-resolution teacher" in init) == (teacher != "far")
    name = "far" if teacher == "far" else "teacher_fused"
    assert f"{name} is 6.8 AP above student_{r}_no_kd (one run)" in margin
    assert f"Distillation itself: student_{r} is 0.8 AP above student_{r}_no_kd (one run)" in distillation
    assert (
        f"2.5 AP above {LONGER.replace('_L', f'_{r}')}" in budget and "1.0 AP above baseline_equal_cost" in equal_cost
    )
    page = write_report(data, tmp_path, "A study").read_text(encoding="utf-8")
    assert f'<tr class="result"><th scope="row"><code>student_{r}</code>' in page

    data["runs"] = [run for run in data["runs"] if run["variant"] != "baseline_H"]
    full, ap = ("far", "42.0") if teacher == "far" else ("teacher_H", "41.0")
    assert f"of the {ap} AP of {full}" in summary(data)[1] and f"of {full}" in accuracy_table(data)[0]
    data["runs"] += runs("student_H", 45.0)
    for pupil, master in ((f"student_{r}", "student_H"), ("student_H", teacher or "teacher")):  # a chain
        data["variants"].setdefault(pupil, {"file": "x.yaml"})["teachers"] = [master]
    assert full_resolution(rows_of(data)).name == full


def test_a_student_is_held_against_its_architecture_alone_in_equal_time(data):
    data["runs"] += runs("baseline_L_shifted@equal_time", 38.5)
    said = (
        "Trained alone for as long as teacher and student together, the student's architecture reaches 38.5 AP: "
        "distillation is 2.5 AP below that (one run)."
    )
    assert alone_as_long(data) == summary(data)[2] == said
    quarter = {"runs": runs("student_EL", 36.0) + runs("baseline_EL_shifted@equal_time", 35.0)}
    assert "1.0 AP above that" in alone_as_long(quarter) and alone_as_long({"runs": runs("student_L", 36.0)}) == ""


@pytest.mark.parametrize(
    ("student", "text"),
    [
        ((36.0, 36.5, 36.1), "1.0 AP above student_L_no_kd (± 0.0, significant)"),
        ((34.0, 34.5, 34.1), "1.0 AP below student_L_no_kd (± 0.0, significant)"),
        ((36.0, 35.0, 34.9), "0.1 AP above student_L_no_kd (± 2.0, not significant)"),
        ((35.0, 35.5, 35.1), "equal, to 0.1 AP, with student_L_no_kd (± 0.0)."),
        ((35.037, 35.54, 35.143), "equal, to 0.1 AP, with student_L_no_kd (± 0.0)."),
    ],
)
def test_three_seeds_decide(student, text):
    found = {"runs": runs("student_L", *student) + runs("student_L_no_kd", 35.0, 35.5, 35.1), "seeds": [0, 1, 2]}
    sentences = summary(found)
    assert text in sentences[-1] and sentences[0].startswith("Means of 3 seeds")


def test_many_classes_have_a_table_of_their_own(seeded, tmp_path):
    """A line a class, means over the seeds that all have it, in the order of the classes."""
    classes = ("traffic-light", "car", "bus", "van", "tram", "truck", "bicycle")
    for run in seeded["runs"]:
        for result in run.get("results", {}).values():
            result["bbox"] |= {f"AP-{name}": 10.0 * i + run["seed"] for i, name in enumerate(classes)}
    seeded["runs"][0]["results"]["a"]["bbox"]["AP-car"] = float("nan")
    headers, cells = class_table(seeded)
    assert headers == ["class", "a", "b", "c"] and [line[0] for line in cells] == list(classes)
    assert cells[:3] == [["traffic-light", "1.0", "1.0", "0.0"], ["car", "-", "11.0", "10.0"],
                         ["bus", "21.0", "21.0", "20.0"]]  # fmt: skip
    page = Page(write_report(seeded, tmp_path, "A study").read_text(encoding="utf-8"))
    assert headers in page.rows and cells[0] in page.rows
    assert "| `tram` " in (tmp_path / "report.md").read_text(encoding="utf-8")
    for run in seeded["runs"]:
        for result in run.get("results", {}).values():
            del result["bbox"]["AP-bus"]
    assert class_table(seeded) == ([], [])


def test_no_percentages_of_what_has_not_converged(data):
    assert no_percentages(data) == []
    far = copy.deepcopy(data)
    for run in far["runs"]:
        if run["variant"] == LONGER:
            run["results"][LONGER]["bbox"]["AP"] = 36.0  # 10.8 % above
    assert (
        "lifts baseline_L_shifted from 32.5 to 36.0 AP: training is far from converged, try 4000 iterations"
        in (no_percentages(far)[0])
    )
    weak = copy.deepcopy(data)
    for run in weak["runs"]:
        for results in run["results"].values():
            results["bbox"]["AP"] /= 5
    assert no_percentages(weak)[0].startswith("baseline_H reaches only 8.0 AP: training is far from converged")
    hot = copy.deepcopy(data)
    hot["runs"][1]["warmup"] = 101
    assert "more than a tenth of the iterations of baseline_L:" in no_percentages(hot)[0]
    for doubtful in (far, weak, hot):
        assert not [title for title in accuracy_table(doubtful)[0] if title.startswith("of ")]
        assert summary(doubtful)[0] == no_percentages(doubtful)[0] and "%" not in summary(doubtful)[2]


def test_the_metric_asked_for_is_the_one_that_is_spoken_of(data):
    """Masks whose numbers are those of the boxes but for a shift; a model without masks is left out."""
    for run in data["runs"]:
        for name, results in run["results"].items():
            if name != "baseline_L":
                results["segm"] = {"AP": results["bbox"]["AP"] - 12.0 + (name == "student_L")}
    evidence, headline, init, _, distillation, *_ = summary(data, "segm/AP")
    assert "a few segm/AP." in evidence
    assert "reaches 25.0 segm/AP, 89 % of the 28.0 segm/AP of baseline_H" in headline
    assert "student_L_no_kd is 2.7 segm/AP above baseline_L_shifted (one run)" in init
    assert "student_L is 1.8 segm/AP above student_L_no_kd" in distillation
    for run in data["runs"]:
        for results in run["results"].values():
            results["segm"] = {"AP": results["bbox"]["AP"] / 5, "AP50": results["bbox"]["AP"]}
    for metric in ("segm/AP", "segm/AP50"):
        assert no_percentages(data, metric)[0].startswith("baseline_H reaches only 8.0 segm/AP:")
        assert not [title for title in accuracy_table(data, metric)[0] if title.startswith("of ")]
    assert no_percentages(data) == []


def test_a_run_that_another_one_stands_for_takes_no_time(data):
    (weak,) = [run for run in data["runs"] if run["variant"] == "baseline_H"]
    weak["results"]["baseline_H"]["bbox"]["AP"] = 5.0
    took = no_percentages(data)[0]
    again = {**copy.deepcopy(weak), "variant": "baseline_H@equal_time", "same_as": "baseline_H"}
    assert no_percentages({**data, "runs": [*data["runs"], again]})[0] == took


def test_summary_of_partial_studies(data):
    data["runs"] = [r for r in data["runs"] if r["variant"] in ("baseline_L", "baseline_L_shifted")]
    assert len(summary(data)) == 2
    assert summary({"runs": runs("student_L", 30.0)})[1].endswith("reaches 30.0 AP.")
    assert summary({}) == ["No model has been evaluated yet."]


@pytest.mark.parametrize("empty", ["baseline_H", "student_L", "teacher"])
def test_a_model_that_detects_nothing_has_an_ap_of_0(data, empty, tmp_path):
    """Both engines say NaN of it. By hand: 30 and 0 are 15 on average, and the difference is counted, too."""
    name = "teacher_fused" if empty == "teacher" else empty
    first = next(run for run in data["runs"] if name in run["results"])
    second = {**copy.deepcopy(first), "seed": 1}
    nothing = float("nan")
    first["results"][name]["bbox"] = {"AP": 30.0, "AP50": 50.0, "APs": 20.0, "APx": nothing, "AP-car": 30.0}
    second["results"][name]["bbox"] = dict.fromkeys(("AP", "AP50", "APs", "APx", "AP-car"), nothing)
    reference = {**copy.deepcopy(next(run for run in data["runs"] if run["variant"] == "baseline_L")), "seed": 1}
    data["runs"] += [second, reference]
    data["seeds"], data["reference"] = [0, 1], "baseline_L"
    text = write_report(data, tmp_path, "A study").read_text(encoding="utf-8")
    again = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert write_report(again, tmp_path, "A study").read_text(encoding="utf-8") == text
    assert f"Nothing is detected by {name} (seed 1): AP counts as 0 there." in text
    assert cell(accuracy_table(data), name, "AP").startswith("15.0 ±")
    row = next(row for row in rows_of(data) if row.name == name)
    base = next(row for row in rows_of(data) if row.name == "baseline_L")
    assert row.minus(base).mean == (30 - 30 + 0 - 30) / 2 and row.minus(base).n == 2
    assert row.values("bbox/APs") == {0: 20.0, 1: 0.0} and row.values("bbox/AP-car") == {0: 30.0, 1: 0.0}
    assert row.values("bbox/APx") == {}  # no model has a number, so there are no objects


# --- files ------------------------------------------------------------------------------------------------------------


def test_report_files(data, seeded, tmp_path):
    data["runs"].append({"variant": "student_L_light", "seed": 0, "error": "KeyError: x"})
    before = copy.deepcopy(data)
    assert cv2.imwrite(str(tmp_path / "panels.jpg"), np.zeros((10, 10, 3), np.uint8))
    path = write_report(data, tmp_path, "A study")
    assert path == tmp_path / "report.html" and str(data) == str(before)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    tables = accuracy_table(data), cost_table(data)
    assert page.rows == [line for headers, cells in tables for line in (headers, *cells)]
    assert page.images == ["results.png", "ap_vs_cost.png", "panels.jpg"]
    assert all((tmp_path / link).is_file() for link in page.links)
    assert "://" not in text and "width=device-width" in text  # nothing from the network
    shown = " ".join(page.text)
    for fact in (*summary(data), data["command"], "torch 2.12.0", "1,200 training images", "1 h 02 min", "KeyError: x"):
        assert fact in shown
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert format_table(accuracy_table(data), "github") in markdown and data["command"] in markdown
    assert all(sentence in markdown for sentence in summary(data))
    assert cv2.imread(str(tmp_path / "results.png")).shape[1] > 600

    for name, value in (("b", 0.3), ("c", 3.0)):
        seeded["variants"][name]["swept"] = ["lad", "DISTILL.LOSSES.0.WEIGHT", value]
    page = Page(write_report(seeded, tmp_path / "compare", "Comparison").read_text(encoding="utf-8"))
    assert page.images == ["results.png", "differences.png", "sweep.png"]


@pytest.mark.parametrize("swept, line", [(("b", "c"), ["a"]), (("a", "b", "c"), [])])
def test_a_sweep_has_a_line_where_its_reference_is_not_swept(seeded, tmp_path, monkeypatch, swept, line):
    seeded["reference"] = "a"
    for value, name in enumerate(swept, 1):
        seeded["variants"][name]["swept"] = ["lad", "DISTILL.LOSSES.0.WEIGHT", value]
    names = []

    def draw(lines, path, key, metric, *reference):
        names.extend(reference[1:])
        path.write_bytes(b"")

    monkeypatch.setattr(report, "plot_sweep_lines", draw)
    write_report(seeded, tmp_path, "Comparison")
    assert names == line


def test_both_budgets_of_a_sweep_have_lines_of_their_own(seeded, tmp_path, monkeypatch):
    seeded["runs"] = []
    for value, ap in ((0.1, 20.0), (1.0, 21.0)):
        for suffix, budget in (("", ""), ("@equal_time", "equal_time"), ("@joined", "")):
            name = f"lad_WEIGHT_{value}{suffix}"
            seeded["runs"] += runs(name, ap + len(suffix))
            swept = {"swept": ["lad", "DISTILL.LOSSES.0.WEIGHT", value], "budget": budget}
            seeded["variants"][name] = {"file": "lad.yaml", "title": "", **swept}
    seeded["runs"] += runs("lad_NORMALIZE_True", 22.0)
    truth = {"file": "lad.yaml", "title": "", "swept": ["lad", "MSAD.FUSION.NORMALIZE", True]}
    seeded["variants"]["lad_NORMALIZE_True"] = truth
    drawn = {}

    def draw(lines, path, *_):
        drawn.update(lines)
        path.write_bytes(b"")

    monkeypatch.setattr(report, "plot_sweep_lines", draw)
    write_report(seeded, tmp_path, "Comparison")
    found = {name: [(value, point.mean) for value, point in points] for name, points in drawn.items()}
    assert found == {
        "lad": [(0.1, 20.0), (1.0, 21.0)], "lad@equal_time": [(0.1, 31.0), (1.0, 32.0)],
        "lad@joined": [(0.1, 27.0), (1.0, 28.0)],
    }  # fmt: skip


def test_names_are_escaped(data, tmp_path):
    data["runs"] += runs("<b>bold</b>&", 3.0)
    data["command"] = "run <x> && y"
    text = write_report(data, tmp_path, "t").read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;bold&lt;/b&gt;&amp;" in text and "run &lt;x&gt; &amp;&amp; y" in text


@pytest.mark.parametrize(
    "partial",
    [
        {},
        {"runs": runs("student_L", 30.0)},
        {"runs": runs("student_L", float("nan"))},
        {"runs": [{"variant": "student_L", "seed": 0, "results": {"student_L": {}}}], "data": {"name": "few"}},
        {"runs": runs("baseline_H", 0.0) + runs("student_L", 0.0), "cost": {"baseline_H": cost(0.0, 0.0)}},
    ],
)
def test_missing_parts_do_not_break_the_report(partial, tmp_path):
    page = Page(write_report(partial, tmp_path / "deep" / "er", "t").read_text(encoding="utf-8"))
    assert not page.open and len(page.rows) == 2 * (1 + len(rows_of(partial)))
