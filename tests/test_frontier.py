"""The frontier: what is best at a given number of bytes, from the committed rows."""

import math
from pathlib import Path

import pytest

from experiments import frontier
from experiments.record import stamped, write_csv


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


def test_links_of_another_task_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, links = tmp_path / "t.csv", tmp_path / "links.csv"
    write_csv(losses, stamped(rows()))
    write_csv(links, stamped([{**r, "task": "u", "rate": "1mbit"} for r in rows()]))
    with pytest.raises(SystemExit):
        frontier.main([str(losses), "--links", str(links)])
    assert "measure the links with the same task" in capsys.readouterr().err
