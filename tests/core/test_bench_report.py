"""The page of a comparison: whole, safe, complete, and its marks where the numbers say."""

import dataclasses
import html
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from mosaic_core import Recipe
from mosaic_core.algorithms import EMA, SAM, MixUp
from mosaic_core.bench.comparison import Comparison, compare
from mosaic_core.bench.plan import BASELINE, Arm, Plan
from mosaic_core.bench.report import _marks as marks
from mosaic_core.bench.report import check, to_html
from mosaic_core.bench.report._pareto import Point, front, outliers
from mosaic_core.bench.report._plots import floor
from mosaic_core.bench.runs import Job, Record, Store
from mosaic_core.bench.statistics import Interval
from mosaic_core.datasets import MissingError
from mosaic_core.training import Evaluation
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")
ENVIRONMENT = {"date": "2026-05-09", "machine": "x86_64", "threads": 2, "torch": "2.9"}
PHASES = {"data": 0.4, "forward": 3.0, "backward": 5.0, "algorithm": 1.0, "optimizer": 0.6}
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    '"&\'$x$ ${y} <b>@0@ url(#a) id="q" #0a0b00',
    "日本語 <!-- -->",
)


def record(job: Job, phases: bool = True, turns: tuple[str, ...] = ()) -> Record:
    """Return a run in which EMA learns faster, and a step of SAM takes twice the time."""
    rng = random.Random(f"{job.recipe}{job.seed}{job.replica}")
    rate = 0.3 * (1.5 if "EMA" in job.recipe else 1) * math.exp(rng.gauss(0, 0.05))
    step = 0.01 * (2 if "SAM" in job.recipe else 1) * math.exp(rng.gauss(0, 0.02))
    end = 0.95 + rng.gauss(0, 0.003)
    evaluations = tuple(
        Evaluation(30 * e, e, 30 * e * step, end - 0.6 * math.exp(-rate * e))
        for e in range(1, job.epochs + 1)
    )
    memory, parts = (40_000_000, PHASES) if phases else (0, {})
    return Record(job, evaluations, 1e3 * step, 0.1, memory, parts, turns, ENVIRONMENT)


def compared(
    folder: Path,
    names: tuple[str, ...] = ("EMA", "SAM", "MixUp"),
    *,
    seeds: int = 6,
    target: float | None = 0.9,
    phases: bool = True,
    trials: int = 0,
    baseline: str = BASELINE,
    trainer: str = "torch",
) -> Comparison:
    recipes = [Recipe([EMA("0.1dur")]), Recipe([SAM()]), Recipe([MixUp()])]
    arms = {baseline: Arm(Recipe(), 20)}
    arms |= {name: Arm(recipes[n % 3], 20) for n, name in enumerate(names)}
    plan = Plan(DIGITS, trainer, arms, range(seeds), target=target)

    def runner(jobs):
        return (record(job, phases, tuple(j.file for j in jobs)) for job in jobs)

    return compare(plan, runner, Store(folder), trials=trials)


class Page(HTMLParser):
    """A page taken apart; elements must be closed in the order in which they were opened."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside != "script":
            (self.styles if inside == "style" else self.texts).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts).replace("\xa0", " "))

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return compared(tmp_path_factory.mktemp("three"), trials=5)


@pytest.fixture(scope="module")
def three_page(three):
    return to_html(three)


CASES = {
    "several": {"trials": 5},
    "many": {"names": tuple(f"arm {n}" for n in range(8)), "seeds": 3},
    "hostile": {"names": HOSTILE, "trainer": "<torch>"},
    "hostile baseline": {"names": HOSTILE[:1], "baseline": '<base> & "line"'},
    "one seed": {"seeds": 1},
    "two seeds": {"seeds": 2},
    "nobody": {"target": 0.999},
    "no phases": {"phases": False},
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def shown(request, tmp_path_factory):
    comparison = compared(tmp_path_factory.mktemp("shown"), **request.param)
    return comparison, to_html(comparison, price=2.5)


# Whole and safe.


def test_the_page_is_well_formed_and_needs_nothing_else(shown):
    page = Page(shown[1])
    ids = page.attributes("id")
    assert len(set(ids)) == len(ids)
    links = page.attributes("href")
    links += [url[4:-1] for url in page.attributes("clip-path")]
    outer = [link for link in links if not link.startswith("#")]
    assert {link for link in links if link not in outer} <= {f"#{name}" for name in ids}
    assert all(link.startswith("https://") for link in outer)
    assert outer == [attrs["href"] for tag, attrs in page.elements if attrs.get("href") in outer]
    assert {tag for tag, attrs in page.elements if attrs.get("href") in outer} == {"a"}
    assert not {name for _, attrs in page.elements for name in attrs} & {"src", "srcset", "xmlns"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "base"}
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "mosaic-data"}]
    assert not re.search(r"@import|url\((?!#)", "".join(page.styles))


def test_nothing_is_left_of_the_making(three_page):
    text = three_page
    assert "#0a0b" not in text  # the colours that become variables
    assert "$" not in text
    assert "matplotlib" not in text


def test_every_name_and_sentence_is_there(shown):
    (comparison, text), page = shown, Page(shown[1])
    for arm, verdict in comparison.verdicts.items():
        assert page.text.count(arm) >= 5
        assert f"{arm} {verdict}" in page.text
        assert verdict.finding in page.text
        assert html.escape(arm) in text


def test_the_data_round_trip(shown):
    comparison, text = shown
    found = re.search(r'id="mosaic-data">(.*?)</script', text, re.DOTALL)
    data = json.loads(found[1])
    assert not set("<>&") & set(found[1])
    assert list(data["records"]) == list(comparison.plan.arms)
    for arm, records in comparison.records.items():
        again = [Record.from_json(json.dumps(each)) for each in data["records"][arm]]
        assert again == list(records)
    assert data["target"] == comparison.target
    assert data["trials"] == {
        arm: [dataclasses.asdict(trial) for trial in trials]
        for arm, trials in comparison.trials.items()
    }


def test_the_same_comparison_gives_the_same_page(three, three_page):
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.labelpad": 20}):
        assert to_html(three) == three_page
        assert matplotlib.rcParams["font.size"] == 30


def test_costs_are_there_for_a_price_only(three, three_page):
    assert "cost" not in Page(three_page).text
    assert "cost at 2.5 an hour" in Page(to_html(three, price=2.5)).text
    for price in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^to_html: price must be positive and finite, got "):
            to_html(three, price=price)
        with pytest.raises(ValueError, match=r"price must be positive"):
            check(price)


def test_without_matplotlib_it_says_how_to_get_it(three, monkeypatch):
    check()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for make in (check, lambda: to_html(three)):
        with pytest.raises(MissingError, match=r'needs matplotlib.*pip install "mosaic-core\[demo'):
            make()


# What is missing is told.


def test_what_was_not_measured_is_told(tmp_path):
    text = Page(to_html(compared(tmp_path, ("EMA",), phases=False))).text
    assert text.count("phases not measured") == 2
    assert text.replace("phases not measured", "").count("not measured") == 2 * 2


def test_one_seed_has_no_interval(tmp_path):
    text = to_html(compared(tmp_path, ("EMA",), seeds=1))
    assert "One seed shows no spread" in text
    assert text.count("no interval</span>") == 3
    assert not re.findall(r'<line class="(?:reach|thin)"', text)


def test_a_target_that_nobody_reaches(tmp_path):
    page = Page(to_html(compared(tmp_path, ("EMA",), target=0.999)))
    assert "No run of any arm reached the target" in page.text
    assert "Nobody can tell yet whether EMA trains faster" in page.text
    assert page.text.count("6 / 6") == 1


def test_runs_apart_and_other_machines_are_told(three, three_page):
    apart = [
        dataclasses.replace(r, turns=(), environment={**ENVIRONMENT, "machine": "another"})
        for r in three.records["EMA"]
    ]
    text = to_html(dataclasses.replace(three, records={**three.records, "EMA": apart}))
    assert "6 of 18 pairs did not take turns" in text
    assert "The runs come from 2 different environments" in text
    assert "Mind that" not in three_page


# Marks stand where the numbers say.


def test_marks_of_the_forest_stand_at_the_estimates(three, three_page):
    table = re.search(r'<table class="forest">.*?</table>', three_page, re.DOTALL)[0]
    ticks = re.findall(r'<text x="([\d.]+)%" y="12">([\d.]+)</text>', table.split("picture b")[0])
    (x0, v0), *_, (x1, v1) = [(float(x), math.log(float(v))) for x, v in ticks]

    def value(x: str) -> float:
        return math.exp(v0 + (float(x) - x0) * (v1 - v0) / (x1 - x0))

    rows = re.findall(r'<th scope="row">.*?picture b', table, re.DOTALL)
    assert len(rows) == 3
    for row in rows:
        name, picture = row.split("picture a")
        arm = re.search(r'"name">(.*?)<', name)[1]
        ratio = three.verdicts[arm].seconds.ratio
        mark = re.search(r'href="#mark-(.*?)" x="([\d.]+)%"', picture)
        assert mark[1] == three.verdicts[arm].finding.replace(" ", "-")
        assert value(mark[2]) == pytest.approx(ratio.estimate, rel=2e-3)
        line = re.search(r'class="reach" x1="([\d.]+)%" x2="([\d.]+)%"', picture)
        assert value(line[1]) == pytest.approx(ratio.low, rel=2e-3)
        assert value(line[2]) == pytest.approx(ratio.high, rel=2e-3)
        dots = [value(x) for x in re.findall(r'class="pair" x1="([\d.]+)%', picture)]
        assert len(dots) == 6
        assert np.log(dots).mean() == pytest.approx(math.log(ratio.estimate), abs=2e-3)


@pytest.mark.parametrize(
    "intervals",
    [
        [Interval(1.0, 1.0, 1.0)],
        [Interval(1.2, 0.0, math.inf)],
        [Interval(0.1, 0.05, 0.2), Interval(3.0, 2.0, 40.0)],
        [Interval(1.001, 0.999, 1.003)],
        [],
    ],
)
def test_scales_hold_estimates_and_few_ticks(intervals):
    scale = marks.ratio_scale([intervals])
    assert 0 < scale.low < 1 < scale.high < math.inf
    assert all(scale.low < i.estimate < scale.high for i in intervals)
    assert 1 in scale.ticks
    assert 1 <= len(scale.ticks) <= 5
    assert scale.at(math.sqrt(scale.low * scale.high)) == pytest.approx(50)
    assert (scale.at(0.0), scale.at(math.inf)) == (0, 100)
    gains = [Interval(i.estimate - 1, i.low - 1, i.high - 1) for i in intervals]
    scale = marks.difference_scale(gains, 0.005)
    assert scale.low < -0.005 < 0 < scale.high < math.inf
    assert all(scale.low < i.estimate < scale.high for i in gains)
    assert 1 <= len(scale.ticks) <= 4


def test_a_recipe_that_went_astray_leaves_the_scale_to_the_others():
    astray, gain = Interval(-0.8, -0.81, -0.79), Interval(0.002, 0.0, 0.004)
    scale = marks.difference_scale([astray, gain, gain], 0.005)
    assert scale.low > -0.05
    picture = marks.interval(scale, astray, "", finding="less accurate", at=0)
    assert 'x="0.00%"' in picture
    assert "arrow" in picture


def test_ends_that_lie_outside_have_arrows():
    scale = marks.ratio_scale([[Interval(1.2, 1.1, 1.3)]])
    whole = marks.interval(scale, Interval(1.2, 1.1, 1.3), "", finding="faster")
    assert whole.count("arrow") == 0
    half = marks.interval(scale, Interval(1.2, 1.1, math.inf), "", finding="cannot tell")
    assert half.count("arrow") == 1
    open_ended = marks.interval(scale, Interval(1.2, 0, math.inf), "", finding="cannot tell")
    assert open_ended.count("arrow") == 2


def test_bars_are_as_long_as_their_phases():
    scale = marks.linear_scale(0, 20)
    picture = marks.stacked(scale, {**PHASES, "strange": 2.0}, 13.0, "")
    bars = re.findall(r'class="phase (\w+)" x="([\d.]+)%" y="4" width="([\d.]+)%"', picture)
    assert [name for name, *_ in bars] == [*PHASES, "other"]
    widths = [float(width) for *_, width in bars]
    assert widths == pytest.approx([5 * ms for ms in [*PHASES.values(), 2.0]])
    assert float(bars[-1][1]) == pytest.approx(5 * sum(PHASES.values()))
    assert 'class="total" x1="65.00%"' in picture


# The Pareto front.


def point(name: str, seconds: float, accuracy: float) -> Point:
    ends = (-math.inf, math.inf)
    return Point(name, "faster", Interval(seconds, *ends), Interval(accuracy, *ends), name)


def test_the_front_is_what_no_arm_beats_in_both():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(1, 9, (12, 2)) / 10  # with ties
        points = [point(str(n), *value) for n, value in enumerate(values)]
        best = {
            p.at
            for p in points
            if not any(q.at != p.at and q.at[0] <= p.at[0] and q.at[1] >= p.at[1] for q in points)
        }
        found = front(points)
        assert {p.at for p in found} == best
        assert len(found) == len(best)
        assert found == sorted(found, key=lambda p: p.at)


def test_an_arm_that_went_astray_is_told_instead_of_drawn(three):
    close = [point(str(n), 10, 0.95 + 0.001 * n) for n in range(6)]
    astray = point("astray", 10, 0.1)
    assert outliers(close) == []
    assert outliers([*close, astray]) == [astray]
    bad = [
        dataclasses.replace(
            r, evaluations=tuple(dataclasses.replace(e, accuracy=0.1) for e in r.evaluations)
        )
        for r in three.records["SAM"]
    ]
    text = Page(to_html(dataclasses.replace(three, records={**three.records, "SAM": bad}))).text
    assert re.search(r"Below the picture: SAM \(10.0 % after \d+ s\)", text)


def test_curves_begin_where_their_end_is_seen_well():
    job = Job("digits", "torch", Recipe().to_yaml(), 0, 20, {})
    runs = [record(dataclasses.replace(job, seed=seed)) for seed in range(8)]
    assert 0.7 < floor(runs) < min(run.final_accuracy for run in runs) - 0.02


def test_names_are_written_as_they_are(tmp_path):
    text = to_html(compared(tmp_path, HOSTILE))
    plot = re.search(r'<figure class="pareto">.*?</svg>', text, re.DOTALL)[0]
    assert sum(html.escape(name) in plot for name in HOSTILE) >= 2  # if there is room
