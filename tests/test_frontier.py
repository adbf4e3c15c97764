"""The frontier: what is best at a given number of bytes, from the committed rows."""

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments.record import stamped, write_csv
from experiments.report import frontier, pages
from experiments.report.pages import curves


def rows() -> list[dict[str, str]]:
    """Two evaluations of three methods; "wide" has two seeds."""
    found = []
    for method, seed, sent, losses in (
        ("float32", 0, 1000, (2.0, 1.0)),
        ("wide", 0, 100, (1.5, 1.2)),
        ("wide", 1, 120, (1.1, 1.4)),  # its best evaluation is not its last
        ("narrow", 0, 90, (3.0, 1.1)),
        ("least", 0, 10, (3.0, 2.9)),
    ):
        for step, loss in zip((10, 20), losses, strict=True):
            found.append(
                {
                    "task": "t",
                    "method": method,
                    "seed": str(seed),
                    "ranks": "2",
                    "steps": "20",
                    "step": str(step),
                    "test_loss": str(loss),
                    "sent_bytes": str(sent * step),
                    "accuracy": "0.5",
                    "push_bits": "1",
                    "pull_bits": "1",
                    "frame_bits": "2",
                    "compute_ms": "1",
                    "codec_ms": "0",
                    "step_ms": "2",
                    "commit": "c",
                    "lc3": "0",
                }
            )
    return found


def test_points_are_the_best_evaluation_of_each_seed() -> None:
    by_name = {point.method: point for point in frontier.points(rows())}
    assert by_name["wide"] == frontier.Point("wide", 110.0, {"0": 1.2, "1": 1.1})
    wide = by_name["wide"]
    assert (wide.loss, wide.low, wide.high, wide.seeds) == (1.15, 1.1, 1.2, 2)
    assert by_name["narrow"].loss == 1.1
    assert list(by_name) == ["float32", "wide", "narrow", "least"]


def test_the_table_says_how_often_it_was_evaluated() -> None:
    found = rows()
    assert "the best of 2 evaluations" in frontier.markdown(found)
    assert "the best of 1 to 2 evaluations" in frontier.markdown(found[1:])


def test_the_table_says_its_warm_up() -> None:
    found = [{**row, "warm_up": "0.2"} for row in rows()]
    assert "20 steps, 20 % of them warm-up, 2 seeds (" in frontier.markdown(found)
    assert "20 steps, 2 seeds (" in frontier.markdown(rows())


def test_the_distance_is_from_float32_at_its_best() -> None:
    found = rows()
    averaged = [
        {**row, "method": "float32, averaged", "test_loss": "0.5"}
        for row in found
        if row["method"] == "float32"
    ]
    table = frontier.markdown([*found, *averaged])
    assert "| float32 (1 of 2 seeds) | 1,000 | 1.0 × | 1.0000 | +100.00 % |" in table
    assert (
        "| float32, averaged (1 of 2 seeds) | 1,000 | 1.0 × | 0.5000 | +0.00 % |"
        in table
    )


def test_what_is_better_sends_no_more() -> None:
    points = frontier.points(rows())
    winners = {p.method: frontier.better(p, points) for p in points}
    assert {m: w and w.method for m, w in winners.items()} == {
        "float32": None,
        "wide": "narrow",
        "narrow": None,
        "least": None,
    }
    text = frontier.markdown(rows())
    wide = "| wide | 110 | 9.1 × | 1.1500 (1.1000 … 1.2000) | +20.00 % | narrow |"
    assert wide in text
    least = "| least (1 of 2 seeds) | 10 | 100.0 × | 2.9000 | +190.00 % | **none** |"
    assert least in text


def test_methods_are_compared_by_the_seeds_of_both() -> None:
    """A seed that goes badly for everything says nothing of the methods it has."""
    more = [
        {**row, "seed": "1", "test_loss": str(float(row["test_loss"]) + 4)}
        for row in rows()
        if row["method"] in ("float32", "least")
    ]
    twice = [
        {**row, "method": "float32, lr × 2", "test_loss": "1.01"}
        for row in rows()
        if row["method"] == "float32"
    ]
    points = frontier.points([*rows(), *more, *twice])
    base = frontier.dense(points)
    assert base is not None
    assert (base.method, base.loss) == ("float32", 3.0)
    found = {point.method: point for point in points}
    assert frontier.ratio(found["wide"], base) == (1.2 + 1.1) / (1 + 5)
    assert frontier.ratio(found["narrow"], base) == 1.1
    assert frontier.ratio(found["narrow"], found["wide"]) == 1.1 / 1.2
    other = frontier.Point("other", 1.0, {"7": 0.1})
    assert math.isnan(frontier.ratio(other, base))
    assert frontier.better(base, [*points, other]) == found["wide"]
    assert frontier.better(base, [other]) is None
    alone = [{**row, "seed": "7"} for row in rows() if row["method"] == "narrow"]
    table = frontier.markdown([*rows()[:2], *alone])
    assert "| narrow | 90 | 11.1 × | 1.1000 | – | **none** |" in table


def test_the_command_draws_loss_against_bytes_and_time(tmp_path: Path) -> None:
    losses, links = tmp_path / "t.csv", tmp_path / "links.csv"
    write_csv(losses, stamped(rows()))
    some = [r for r in rows() if r["method"] != "least"]
    write_csv(
        links, stamped([{**r, "rate": k} for k in ("1mbit", "9mbit") for r in some])
    )
    docs = tmp_path / "page.md"
    docs.write_text("<!-- t:begin -->\n<!-- t:end -->")
    picture = tmp_path / "picture.png"
    frontier.main(
        [*map(str, (losses, "--links", links, "--plot", picture, "--docs", docs))]
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "| narrow |" in docs.read_text()


def test_how_long_methods_take_until_they_are_near_float32s_best() -> None:
    """2, then 1 passes 1.5 in the middle of two evaluations, and so on."""
    slower = [
        {**row, "method": "float32, lr × 3", "test_loss": str(loss)}
        for row, loss in zip(rows()[:2], (1.5, 1.4), strict=True)
    ]
    links = [
        {**row, "rate": rate, "step_ms": str(ms)}
        for row in rows()
        for rate, times in (("1mbit", 10), ("9mbit", 1))
        for method, ms in (("float32", 6000 * times), ("wide", 600), ("narrow", 900))
        if row["method"] == method
    ]
    table = frontier.waits([*rows(), *slower], links, 50)
    assert table.splitlines()[2:6] == [
        "| float32 (1 of 2 seeds) | 15 | 15.0 min (0.7 ×) | 1.5 min (0.7 ×) |",
        "| float32, lr × 3 (1 of 2 seeds) | 10 | 10.0 min (1.0 ×) | 1.0 min (1.0 ×) |",
        # Its first evaluation of the seed that float32 has; the other one says nothing.
        "| wide | 10 | 0.1 min (100.0 ×) | 0.1 min (10.0 ×) |",
        "| narrow (1 of 2 seeds) | 18 | 0.3 min (37.3 ×) | 0.3 min (3.7 ×) |",
    ]
    assert "least" not in table  # the lab did not measure it
    table = frontier.waits([*rows(), *slower], links, 5)
    assert "| narrow (1 of 2 seeds) | not reached | – | – |" in table
    assert "steps until 5 % above float32's best" in table
    alone = [{**row, "seed": "7"} for row in rows() if row["method"] == "narrow"]
    table = frontier.waits([*rows()[:2], *alone], links, 50)
    assert "| narrow | – | – | – |" in table
    # A seed in which all take longer says nothing of a method that was not trained so.
    late = [
        {**row, "seed": "1", "test_loss": str(loss)}
        for row, loss in zip(rows()[:2], (9, 1.0), strict=True)
    ]
    table = frontier.waits([*rows(), *late], links, 50)
    assert "| float32 | 17 | 17.2 min (1.0 ×) | 1.7 min (1.0 ×) |" in table
    assert (
        "| narrow (1 of 2 seeds) | 18 | 0.3 min (55.9 ×) | 0.3 min (5.6 ×) |" in table
    )


def test_how_long_needs_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, links = tmp_path / "t.csv", tmp_path / "links.csv"
    write_csv(losses, stamped(rows()))
    write_csv(links, stamped([{**r, "rate": "1mbit"} for r in rows()[2:]]))
    command = [str(losses), "--within"]
    for arguments, said in (
        ([*command, "1"], "--within needs --links"),
        ([*command, "-1", "--links", str(links)], "--within -1.0 must be 0 or more"),
        ([*command, "nan", "--links", str(links)], "--within nan must be 0 or more"),
        ([*command, "1", "--links", str(links)], "no rows of float32"),
    ):
        with pytest.raises(SystemExit):
            frontier.main(arguments)
        assert said in capsys.readouterr().err
    write_csv(links, stamped([{**r, "rate": "1mbit"} for r in rows()]))
    page = tmp_path / "page.md"
    page.write_text("<!-- t-times:begin -->\n<!-- t-times:end -->")
    frontier.main([*command, "1", "--links", str(links), "--docs", str(page)])
    assert "| float32 (1 of 2 seeds) | 20 |" in page.read_text()


def test_a_curve_says_of_how_many_seeds_it_is() -> None:
    twice = [
        {**row, "method": "wide, lr × 2"} for row in rows() if "wide" in row["method"]
    ]
    axes = Figure().subplots()
    everything = curves([*rows(), *twice])
    frontier._draw(axes, everything, {c.method: c.sent_mb for c in everything})
    labels = ["float32 (1 of 2 seeds)", "wide", "narrow (1 of 2 seeds)"]
    labels += ["least (1 of 2 seeds)", "wide, lr × 2"]
    assert axes.get_legend_handles_labels()[1] == labels


def test_a_method_is_drawn_at_the_best_of_its_rates() -> None:
    faster = [
        {**row, "method": "wide, lr × 2", "test_loss": str(float(row["test_loss"]) / 2)}
        for row in rows()
        if row["method"] == "wide"
    ]
    slower = [
        {**row, "method": "narrow, lr × 0.5", "test_loss": "9"}
        for row in rows()
        if row["method"] == "narrow"
    ]
    found = frontier.at_best_rate([*rows(), *faster, *slower])
    assert found == ["float32", "wide, lr × 2", "narrow", "least"]


def test_time_to_accuracy_is_compared_by_the_seeds_of_both() -> None:
    """Seed 1 of float32 ends at 0.8, which would be a target that nothing reaches."""
    found = [{**row, "rate": "1mbit"} for row in rows() if row["method"] != "least"]
    found += [
        {**row, "seed": "1", "accuracy": "0.8"}
        for row in found
        if row["method"] == "float32"
    ]
    table = pages.time_markdown(found)
    assert "| narrow (1 of 2 seeds) | 0.02 s |" in table
    assert "| wide | not reached |" in table
    assert "of 64.35 %, 99 % of what float32 ends with, with the same seeds." in table
    assert "with the same seeds" not in pages.time_markdown(found[:2])
    alone = [row for row in found if row["method"] != "float32" or row["seed"] == "1"]
    assert "| narrow (1 of 2 seeds) | – |" in pages.time_markdown(alone)


def test_links_of_another_task_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, links = tmp_path / "t.csv", tmp_path / "links.csv"
    write_csv(losses, stamped(rows()))
    write_csv(links, stamped([{**r, "task": "u", "rate": "1mbit"} for r in rows()]))
    with pytest.raises(SystemExit):
        frontier.main([str(losses), "--links", str(links)])
    assert "measure the links with the same task" in capsys.readouterr().err
