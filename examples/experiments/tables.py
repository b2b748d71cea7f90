"""Tables of finished runs: one row a run, and one row a setting with the mean over its seeds."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from plan import Planned

# Tasks whose data the scripts make.
GENERATED = ("pathfinder", "pathx", "listops")
Row = tuple[dict[str, Any], dict[str, Any]]


def finished(planned: Sequence[Planned], records: dict[str, dict]) -> list[Row]:
    """(labels, record) of those runs that were made, in the plan's order."""
    return [(run.labels, records[run.key]) for run in planned if run.key in records]


def is_timed(row: Row) -> bool:
    return row[1]["recipe"]["timed_steps"] > 0


def quality(record: dict[str, Any]) -> float:
    """Bits per byte (lower is better) or accuracy; NaN for a run that diverged."""
    values = record["quality"]
    value = values["bits_per_byte"] if "bits_per_byte" in values else values["accuracy"]
    return math.nan if value is None or values.get("loss", 0.0) is None else value


def quality_name(record: dict[str, Any]) -> str:
    return "bits per byte" if record["recipe"]["task"] == "lm" else "accuracy"


def by_setting(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Settings (labels without the seed) with the records of all seeds."""
    groups: dict[tuple, tuple[dict, list]] = {}
    for labels, record in rows:
        setting = {name: value for name, value in labels.items() if name != "seed"}
        groups.setdefault(tuple(setting.items()), (setting, []))[1].append(record)
    return list(groups.values())


def mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def spread(values: Sequence[float | None]) -> float:
    """Standard deviation of the values; NaN for fewer than two."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.stdev(known) if len(known) > 1 else math.nan


def number(value: float | None, form: str) -> str:
    # 0 has no sign, however the rounding came to it.
    return "" if value is None or math.isnan(value) else re.sub(r"^-(?=[0.]+%?$)", "", format(value, form))


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    deviation = number(spread(values), form)
    return number(mean(values), form) + (f" ± {deviation}" if deviation else "")


def _quality_cell(record: dict[str, Any]) -> str:
    value = quality(record)
    return "diverged" if math.isnan(value) else format(value, ".4f")


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


RUN_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality": _quality_cell,
    "rate": lambda r: number(r["mean_rate"], ".1%"),
    "rate by layer": lambda r: ", ".join(number(rate, ".0%") for rate in r["rates"]),
    "span": lambda r: number(r["mean_span"], ".0f"),
    "FLOPs saved": lambda r: number(r["share_saved"], ".1%"),
    "parameters": lambda r: f"{r['parameters']:,}",
}


def runs_table(rows: Sequence[Row]) -> str:
    """A row for each run that learnt something."""
    if not rows:
        return ""
    names = list(rows[0][0])
    cells = [[*labels.values(), *(column(record) for column in RUN_COLUMNS.values())] for labels, record in rows]
    return markdown([*names, *RUN_COLUMNS], cells)


def settings_table(rows: Sequence[Row]) -> str:
    """A row for each setting: mean and standard deviation over its seeds."""
    if not rows:
        return ""
    cells = []
    for setting, records in by_setting(rows):
        cells.append([
            *setting.values(),
            len(records),
            quality_name(records[0]),
            mean_and_spread([quality(record) for record in records], ".4f"),
            mean_and_spread([record["mean_rate"] for record in records], ".1%"),
            mean_and_spread([record["mean_span"] for record in records], ".0f"),
            number(mean([record["share_saved"] for record in records]), ".1%"),
        ])  # fmt: skip
    head = [*by_setting(rows)[0][0], "seeds", "measure", "quality", "rate", "span", "FLOPs saved"]
    return markdown(head, cells)


def speed_table(rows: Sequence[Row]) -> str:
    """A row for each run that was timed with the device to itself."""
    if not rows:
        return ""
    cells = [
        [
            *labels.values(),
            f"{record['parameters']:,}",
            f"{1e3 * record['seconds_a_step']:.1f}",
            f"{record['tokens_per_second']:,.0f}",
            number(record["memory_gib"], ".2f"),
        ]
        for labels, record in rows
    ]
    return markdown([*rows[0][0], "parameters", "ms a step", "tokens/s", "peak GiB"], cells)


def conditions(rows: Sequence[Row]) -> str:
    """Size, data, device and versions, as the records have them."""
    lines = []
    for task in dict.fromkeys(record["recipe"]["task"] for _, record in rows):
        records = [record for _, record in rows if record["recipe"]["task"] == task and "quality" in record]
        if not records:
            continue

        def said(get: Callable[[dict], Any], records=records, form: str = ",") -> str:
            values = sorted({get(record) for record in records})
            between = " or " if len(values) < 3 else " to "
            return between.join(format(value, form) for value in values[:1] + values[1:][-1:])

        data = {name for record in records for name in record["data"]["files"] if name and task not in GENERATED}
        # Of a model from elsewhere it is not known.
        trained = all("trained_tokens" in record for record in records)
        lines.append(
            f"* {task}: {said(lambda r: r['parameters'])} parameters, "
            + (f"{said(lambda r: r['recipe']['steps'])} steps, " if trained else "")
            + (f"{said(lambda r: r['trained_tokens'])} tokens a run, " if trained else "")
            + f"measured on {said(lambda r: r['measured_tokens'])}; "
            + (", ".join(sorted(data)) or "generated data")
        )
    seeds = sorted({record["recipe"]["seed"] for _, record in rows})
    jobs = sorted({record["jobs"] for _, record in rows})
    devices = sorted({record["device"] for _, record in rows})
    versions = sorted(
        {f"torch {r['versions']['torch']}, transformers {r['versions']['transformers']}" for _, r in rows}
    )
    lines.append(f"* seeds {', '.join(map(str, seeds))}; {'; '.join(devices)}; {'; '.join(versions)}")
    lines.append(f"* runs at a time: {', '.join(map(str, jobs))}")
    return "\n".join(lines) + "\n"
