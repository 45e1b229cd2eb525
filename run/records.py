"""From answers to tables: records on disk, means with intervals, paired
differences.

A record holds what one cache answered about one document (see eval.measure).
Records are appended to a .jsonl.gz as they are made, so that a run that was
stopped can go on. A cell is the weighted mean over all answers of one kind, for a
task, a method and a kept fraction. A result is a JSON file with the cells of a run,
beside the records.
"""
import gzip
import json
import os
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data.tasks import METRICS, SHARES
from run.checkpoint import lock_dir
from run.errors import BadInput, expect, parse_json, read_json, reading, write_atomic

MIN_UNITS = 8     # an interval over fewer units is not shown
RESAMPLES = 1000  # of the bootstrap
UNITS = {
    "kl": "KL to the full cache's predictions, nats per token, lower is better",
    "f1": "F1, 0 to 1, higher is better",
    "match": "share of the values found, higher is better",
    "rougeL": "ROUGE-L F, 0 to 1, higher is better",
    "accuracy": "accuracy, 0 to 1, higher is better",
    "tokens_per_s": "tokens per second at batch 1, higher is better",
}


def keeps_of(method: str | None, keeps) -> list[float]:
    """The kept fractions of a method: `full` has only 1, and `none` only 0."""
    if method == "full":
        return [1.0]
    if method == "none":
        return [0.0]
    return list(keeps)


# ------------------------------------------------------------- records on disk

def check_record(record: dict) -> None:
    """Refuse what eval.measure cannot have made. Errors: ValueError or KeyError."""
    expect(record["case"], int)
    expect(record["unit"], str, int)
    expect(record["method"], str)
    numbers = [record[key] for key in ("keep", "N", "K", "bytes")]
    numbers += [record["seconds"][key] for key in ("prefill", "compress", "decode")]
    for answer in expect(record["answers"], list):
        expect(answer["kind"], str)
        numbers += [answer[key] for key in ("weight", *METRICS[record["task"]])]
    for number in numbers:
        expect(number, int, float)


def load_records(path) -> list[dict]:
    """The records in a .jsonl.gz, up to where a write was cut off, if one was.

    What follows a cut is removed from the file, and will be measured again.
    """
    path = Path(path)
    if not path.exists():
        return []
    with reading(path, "no answers of this program: move it away, or give another --out"):
        raw = rest = path.read_bytes()
        text = b""
        while rest.startswith(b"\x1f\x8b"):
            member = zlib.decompressobj(wbits=31)
            try:
                content = member.decompress(rest)
            except zlib.error:
                break
            if not member.eof:
                break
            text += content
            rest = member.unused_data
        # an empty file, or one whose first write was cut off, is ours
        if rest == raw and not b"\x1f\x8b\x08".startswith(raw[:3]):
            raise ValueError("not gzip")
        records = [parse_json(line.decode()) for line in text.splitlines()]
        for record in records:
            check_record(record)

    if rest:
        print(f"{path}: a write was cut off; the {len(records)} records before it are used")
        whole = raw.removesuffix(rest)
        write_atomic(path, lambda temporary: temporary.write_bytes(whole))
    unique = {(r["task"], r["case"], r["method"], r["keep"]): r for r in records}
    return list(unique.values())


def append_records(path, records: list[dict]) -> None:
    """Append one gzip member in a single write, as other processes append,
    too."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    member = gzip.compress(text.encode())
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(member) < len(member):
                raise OSError("only a part of it was written: is the disk full?")
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error}); the same command goes on "
                       "from what is there") from None


def write_result(path, result: dict) -> None:
    """Write a result as JSON, atomically, with a line for each cell."""
    about = {key: value for key, value in result.items() if key != "cells"}
    head = json.dumps(about, indent=2, ensure_ascii=False).removesuffix("\n}")
    cells = [f"    {json.dumps(cell, ensure_ascii=False)}" for cell in result["cells"]]
    text = f'{head},\n  "cells": [\n' + ",\n".join(cells) + "\n  ]\n}\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# --------------------------------------------------------- going on with a run

# A run that goes on appends its own value to the earlier ones, with these separators.
JOINED = {"commit": ", ", "threads": ", ", "processes": ", ", "command": "; "}


def compare_settings(out: Path, old: dict, new: dict) -> None:
    """BadInput where a run with other settings made --out. A later run may add tasks."""
    groups = [("", old, new)]
    for task in old["tasks"]:
        if task in new["tasks"]:
            groups.append((f"{task} ", old["tasks"][task], new["tasks"][task]))
    for name, before, now in groups:
        for key in before:
            if key != "tasks" and before[key] != now.get(key):
                raise BadInput(f"{out}: made with {name}{key} = {before[key]}, this run has "
                               f"{now.get(key)}; use the same settings, or give another --out")


def continue_from(out: Path, answers: Path, result: dict) -> list[dict]:
    """The records of the run that made --out. Its seconds, cells and settings are put
    into `result`, which continues it."""
    if not out.exists():
        if answers.exists():
            raise BadInput(f"{answers}: answers without their result {out}; move them away, "
                           "or give another --out")
        write_result(out, result)
        return []

    before = read_json(out)
    with reading(out, "it is not a result of this program: give another --out"):
        old = expect(before["settings"], dict)
        for task in expect(old["tasks"], dict).values():
            expect(task, dict)
        for key, joint in JOINED.items():  # every value once
            values = str(expect(before[key], str, int)).split(joint)
            result[key] = joint.join(dict.fromkeys([*values, str(result[key])]))
        result["seconds"] = expect(before["seconds"], int, float)
        result["against"] = result["against"] or expect(before["against"], str, type(None))
        result["cells"] = expect(before["cells"], list)
    compare_settings(out, old, result["settings"])
    result["settings"]["tasks"] = old["tasks"] | result["settings"]["tasks"]
    return load_records(answers)


class Results:
    """What a run finds: in memory, and with --out in two files.

    All processes append records, and the first one writes the result. In a `with`
    block it holds a lock on --out, because two runs would overwrite each other's
    result.
    """

    def __init__(self, out: str | None, world):
        self.world = world
        self.out = Path(out) if out else None
        self.start = time.perf_counter()
        self.records = []  # of earlier runs, and of tasks that are finished
        self.fresh = []    # of the task at hand, made by this process
        self.locks = ExitStack()

    def __enter__(self) -> "Results":
        if self.out:
            name = self.out.name
            lock = lock_dir(self.out.parent, f".{name}.lock", f"writing {name}")
            self.world.on_rank0(lambda: self.locks.enter_context(lock))
        return self

    def __exit__(self, *_):
        self.locks.close()

    def begin(self, result: dict) -> None:
        """result: all that is known before the first answer."""
        self.result = result | {"seconds": 0, "cells": []}
        if self.out:
            self.answers = self.out.with_name(self.out.name.removesuffix(".json") + ".jsonl.gz")
            self.records = self.world.on_rank0(
                lambda: continue_from(self.out, self.answers, self.result))
        self.start -= self.result["seconds"]

    def done(self, task: str, wanted: set) -> set:
        """Of the wanted (case, method, keep), those that are measured
        already."""
        measured = {(r["case"], r["method"], r["keep"]) for r in self.records
                    if r["task"] == task}
        done = wanted & measured
        if done:
            print(f"{task}: {len(done)} of {len(wanted)} caches were measured before")
        self.fresh = []
        return done

    def add(self, records: list[dict]) -> None:
        self.fresh += records
        if self.out:
            append_records(self.answers, records)
            self.write()

    def write(self) -> None:
        self.result["seconds"] = round(time.perf_counter() - self.start, 1)
        if self.out and not self.world.rank:
            write_result(self.out, self.result)

    def finish(self, task: str) -> None:
        """Gather the records of a task from all processes, and make cells of
        them."""
        fresh = sorted(self.world.gather(self.fresh), key=lambda r: r["case"])
        self.records += fresh
        print(f"{task}: {len(fresh)} caches measured")
        if not self.world.rank:
            tasks = self.result["settings"]["tasks"]
            sizes = {name: settings.get("contexts", 0) for name, settings in tasks.items()}
            self.result["cells"] = cells_of(self.records, self.result["against"], sizes)
            self.write()


# -------------------------------------------------------- means and intervals

def mean_and_interval(units, values, weights, judgements: bool = False):
    """The weighted mean of values, and its 95 % bootstrap interval or None.

    Whole units (documents) are drawn with replacement, because answers about
    one document depend on each other. A single unit has no interval.

    judgements: the values are from 0 to 1. If all are 0 (or 1), all resamples
    agree and a bootstrap would claim certainty. Then it is Clopper and
    Pearson's exact interval for so many units: 0 of 20 gives 0 to 0.17. (Paired
    differences do not have this guard.)
    """
    weights = np.asarray(weights, float)
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    sums = np.bincount(unit, np.asarray(values, float) * weights)
    counts = np.bincount(unit, weights)
    n = len(counts)
    mean = float(sums.sum() / counts.sum())
    interval = None
    if judgements and n > 1 and mean in (0, 1):
        bound = 0.025 ** (1 / n)
        interval = [0.0, 1 - bound] if mean == 0 else [bound, 1.0]
    elif n > 1:
        drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        interval = np.percentile(means, [2.5, 97.5]).tolist()
    return round(mean, 5), interval and [round(x, 5) for x in interval]


def complete(records: list[dict], sizes: dict[str, int]) -> list[dict]:
    """The records of the methods and kept fractions that saw all documents of a
    task.

    The others come from a run that was stopped, and their means would be over fewer
    documents.
    sizes: the number of documents of each task; without it, the most that any method
        saw.
    """
    seen = {}
    for r in records:
        seen.setdefault((r["task"], r["method"], r["keep"]), set()).add(r["case"])
    documents = {}
    for (task, _, _), cases in seen.items():
        documents[task] = max(documents.get(task, 0), len(cases), sizes.get(task, 0))
    for (task, method, keep), cases in seen.items():
        if len(cases) < documents[task]:
            print(f"{task}: {method}, keep {keep:g} is left out; it saw {len(cases)} of "
                  f"{documents[task]} documents")
    return [r for r in records
            if len(seen[r["task"], r["method"], r["keep"]]) == documents[r["task"]]]


def kinds_of(answer: dict) -> list[str]:
    """The groups that an answer counts in: the prefixes of its kind, and
    "all"."""
    parts = answer["kind"].split("/")
    kinds = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return list(dict.fromkeys([*kinds, "all"]))


def cells_of(
    records: list[dict], against: str | None = None, sizes: dict[str, int] | None = None,
) -> list[dict]:
    """A cell for each task, kind, method and kept fraction.

    against: a method; a cell then has the difference to that method at the same
        kept fraction, paired answer by answer. (`full` and `none` have one kept fraction only.)
    sizes: see `complete`.
    """
    tasks = list(dict.fromkeys(r["task"] for r in records))
    records = complete(records, sizes or {})
    records.sort(key=lambda r: (tasks.index(r["task"]), r["case"]))
    groups = {}
    for r in records:
        for j, answer in enumerate(r["answers"]):
            for kind in kinds_of(answer):
                group = groups.setdefault((r["task"], kind, r["method"], r["keep"]), {})
                group[r["case"], j] = (r, answer)

    cells = []
    for (task, kind, method, keep), group in groups.items():
        other = groups.get((task, kind, against, keeps_of(against, [keep])[0]), {})
        difference = against if group.keys() <= other.keys() else None
        cell = {"task": task, "kind": kind, "method": method, "keep": keep}
        cells.append(cell | summarize(group, METRICS[task], difference, other))
    return cells


def summarize(group: dict, metrics, against: str | None, other: dict) -> dict:
    """The numbers of a cell. group, other: (case, j) -> (record, its answer
    j)."""
    units = [r["unit"] for r, _ in group.values()]
    weights = [answer["weight"] for _, answer in group.values()]
    contexts = list({r["case"]: r for r, _ in group.values()}.values())
    sizes = {key: float(np.mean([r[key] for r in contexts])) for key in ("N", "K", "bytes")}
    cell = {"n": len(group), "contexts": len(contexts), "N": round(sizes["N"], 1),
            "K": round(sizes["K"], 1), "cache_bytes": round(sizes["bytes"]),
            "mean": {}, "ci95": {}, "units": len(set(units)), "seconds": {}}
    for key in ("prefill", "compress", "decode"):
        median = float(np.median([r["seconds"][key] for r in contexts]))
        cell["seconds"][key] = round(median, 4)
    if against:
        difference = cell["difference"] = {"against": against, "mean": {}, "ci95": {}}

    for metric in metrics:
        values = [answer[metric] for _, answer in group.values()]
        cell["mean"][metric], cell["ci95"][metric] = mean_and_interval(
            units, values, weights, metric in SHARES)
        if against:
            values = [answer[metric] - other[key][1][metric]
                      for key, (_, answer) in group.items()]
            difference["mean"][metric], difference["ci95"][metric] = mean_and_interval(
                units, values, weights)
    return cell


# ------------------------------------------------------ the table in the terminal

def with_interval(found: dict, metric: str, units: int, form: str, to: str = "–") -> str:
    """The mean of a cell, or of its difference, and its interval if there are
    enough units."""
    text = format(found["mean"][metric], form)
    if units < MIN_UNITS:
        return text
    low, high = found["ci95"][metric]
    return f"{text} ({low:{form}}{to}{high:{form}})"


def print_table(cells: list[dict], by_kind: bool = True) -> None:
    """Print the first metric of each task.

    by_kind: one table for each kind of question, and one for all of them; else
    only the latter.
    """
    for task in dict.fromkeys(cell["task"] for cell in cells):
        mine = [cell for cell in cells if cell["task"] == task]
        kinds = {cell["kind"] for cell in mine if "/" not in cell["kind"]}
        if len(kinds) == 2 or not by_kind:
            kinds = {"all"}  # if there are two, the other kind has the same answers
        for kind in sorted(kinds, key=lambda kind: (kind == "all", kind)):
            print_kind(task, kind, [cell for cell in mine if cell["kind"] == kind])


def print_kind(task: str, kind: str, cells: list[dict]) -> None:
    """One table: a row per method, and a column per kept fraction."""
    metric = next(iter(METRICS[task]))
    found = {(cell["method"], cell["keep"]): cell for cell in cells}
    some = cells[0]
    print(f"\n{task}, {kind}{' kinds' * (kind == 'all')}: {UNITS[metric]}")
    about = (f"{counted(some['n'], 'answer')} about {counted(some['contexts'], 'document')} "
             f"of {some['N']:.0f} tokens")
    if some["units"] == 1 < some["contexts"]:
        about += ", all of them pieces of one text"
    if some["units"] >= MIN_UNITS:
        about += "; in parentheses: 95 % intervals"
    print(about)

    compressed = [cell for cell in cells if cell["method"] not in ("full", "none")]
    keeps = sorted({cell["keep"] for cell in compressed}, reverse=True) or [1.0]
    rows = [["method"] + [f"keep {keep:g}" for keep in keeps]]
    if "chance" in METRICS[task]:
        rows.append(["(chance)"] + [f"{some['mean']['chance']:.3f}"] * len(keeps))
    for method in dict.fromkeys(cell["method"] for cell in cells):
        row = [method]
        minus = [""]
        for keep in keeps:
            cell = found.get((method, *keeps_of(method, [keep])))
            row.append(with_interval(cell, metric, cell["units"], ".3f") if cell else "")
            difference = cell and cell.get("difference")
            if difference and difference["against"] != method:
                minus[0] = f"  minus {difference['against']}"
                minus.append(with_interval(difference, metric, cell["units"], "+.3f", ", "))
            else:
                minus.append("")
        rows.append(row)
        if any(minus):
            rows.append(minus)

    full = found.get(("full", 1.0))
    if full and compressed:
        row = ["fewer bytes"]
        for keep in keeps:
            ratios = [full["cache_bytes"] / cell["cache_bytes"]
                      for cell in compressed if cell["keep"] == keep]
            ends = dict.fromkeys([f"{min(ratios):.1f}", f"{max(ratios):.1f}"])
            row.append("–".join(ends) + "x")
        rows.append(row)
    print_columns(rows)


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def print_columns(rows: list[list[str]]) -> None:
    """Print rows of texts, the first column flush left and the others flush right."""
    first = max(len(row[0]) for row in rows)
    width = 1 + max(len(text) for row in rows for text in row[1:])
    for name, *texts in rows:
        print((name.ljust(first) + "".join(text.rjust(width) for text in texts)).rstrip())
