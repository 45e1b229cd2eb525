"""From answers to tables: records on disk, means with bootstrap intervals, paired differences.

A record is what one compressed document answered (eval.measure). Records are appended to a .jsonl.gz as they are made,
so that an interrupted run goes on where it stopped; cells are computed from all of them.
"""
import gzip
import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from run.errors import BadInput, read_json, write_atomic
from data.tasks import METRICS, SHARES
from run.folders import alone_in


def keeps_of(method: str, keeps) -> list[float]:
    """The full cache and no document have one kept fraction each; all other methods have `keeps`."""
    return {"full": [1.0], "none": [0.0]}.get(method, list(keeps))


def members(raw: bytes) -> Iterator[bytes | None]:
    """What each gzip member holds. None for a torn one, of a process killed while writing; another may have appended
    since, so the search goes on."""
    at = 0
    while 0 <= at < len(raw):
        d, text = zlib.decompressobj(wbits=31), b""
        try:
            text = d.decompress(raw[at:])
        except zlib.error:
            pass  # torn, or no gzip at all: d.eof stays False
        yield text if d.eof else None
        at = len(raw) - len(d.unused_data) if d.eof else raw.find(b"\x1f\x8b\x08", at + 1)


def load_records(path) -> list[dict]:
    """The records in a .jsonl.gz. What a killed run left half written is cut out of it."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e}); move it away, or give another --out") from None
    parts = list(members(raw))
    lines = [line for part in parts if part is not None for line in part.splitlines()]
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError as e:
        raise BadInput(f"{path}: not JSON lines ({e}); move it away, or give another --out") from None
    gzipped = raw[:2] in (b"\x1f\x8b", b"\x1f", b"")
    if not gzipped or not all({"task", "case", "method", "keep"} <= set(r) for r in records):
        raise BadInput(f"{path}: no answers of this program in it; move it away, or give another --out")
    if None in parts:
        print(f"{path}: a part was cut off while it was written; the {len(records)} records in the rest are used")
        write_atomic(path, lambda tmp: tmp.write_bytes(gzip.compress(b"".join(x + b"\n" for x in lines))))
    return list({(r["task"], r["case"], r["method"], r["keep"]): r for r in records}.values())


def write_result(path, result: dict) -> None:
    """The result as JSON, atomically, with a line for each cell."""
    head = json.dumps({k: v for k, v in result.items() if k != "cells"}, indent=2, ensure_ascii=False)[:-2]
    cells = ",\n".join(f"    {json.dumps(c, ensure_ascii=False)}" for c in result["cells"])
    text = f'{head},\n  "cells": [\n{cells}\n  ]\n}}\n'
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def append_records(path, records: list[dict]) -> None:
    """One gzip member more, flushed to disk; in one system call, as several processes may append to the same file."""
    text = "".join(json.dumps(r) + "\n" for r in records)
    member = gzip.compress(text.encode())
    try:
        with open(path, "ab", buffering=0) as f:
            if f.write(member) < len(member):
                raise OSError("only a part of it was written: is the disk full?")
            os.fsync(f.fileno())
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e}); the same command goes on from what is there") from None


def continue_from(out: Path, answers: Path, result: dict) -> list[dict]:
    """The records of an earlier run, which `result` then continues; BadInput if its settings were others."""
    if not out.exists():
        if answers.exists():
            raise BadInput(f"{answers}: answers without their result {out}; move them away, or give another --out")
        write_result(out, result | {"cells": []})
        return []
    before = read_json(out)
    old, new = before.get("settings"), result["settings"]
    if not isinstance(old, dict) or not isinstance(old.get("tasks"), dict):
        raise BadInput(f"{out}: not a result of this program; give another --out")
    flat = lambda s: {**{k: v for k, v in s.items() if k != "tasks"},  # noqa: E731
                      **{f"{t} {k}": v for t, x in s["tasks"].items() if t in new["tasks"] for k, v in x.items()}}
    for key, value in flat(old).items():
        if flat(new).get(key) != value:
            raise BadInput(f"{out}: made with {key} = {value}, this run has {flat(new).get(key)}; use the same "
                           "settings, or give another --out")
    new["tasks"] = {**old["tasks"], **new["tasks"]}
    result["seconds"] = before.get("seconds", 0)
    for key, joint in (("commit", ", "), ("command", "; ")):
        parts = before.get(key, "").split(joint)
        result[key] = joint.join(parts + [result[key]] * (result[key] not in parts))
    for key in ("threads", "processes"):  # of several runs that differ, all that there were
        found = list(dict.fromkeys([*str(before.get(key, 1)).split(", "), str(result.get(key, 1))]))
        result[key] = ", ".join(found) if len(found) > 1 else int(found[0])
    result["against"] = result.get("against") or before.get("against")
    result["cells"] = before.get("cells", [])
    return load_records(answers)


class Results:
    """What a run has found: in memory, and, with --out, in two files, where an earlier run may have left a part of it.
    All processes add what they find; the first one writes the result. As a context it holds a lock on --out, for two
    runs would ask everything twice, and each would overwrite the other's result."""

    def __init__(self, out: str | None, world):
        self.world, self.start, self.records, self.fresh = world, time.perf_counter(), [], []
        self.out = None if out is None else Path(out)
        self.answers = self.out and self.out.with_name(self.out.name.removesuffix(".json") + ".jsonl.gz")
        self.held = ExitStack()

    def __enter__(self) -> "Results":
        if self.out:
            self.world.on_rank0(lambda: self.held.enter_context(
                alone_in(self.out.parent, f".{self.out.name}.lock", f"writing {self.out.name}")))
        return self

    def __exit__(self, *_):
        self.held.close()

    def begin(self, result: dict) -> None:
        """result: all that is known before the first answer. Errors: BadInput if --out holds one of other settings."""
        self.result = result
        if self.out:
            self.records = self.world.on_rank0(lambda: continue_from(self.out, self.answers, result))
        self.before, self.saved = result.get("seconds", 0), self.start

    def seconds(self) -> float:
        return round(self.before + time.perf_counter() - self.start, 1)

    def done(self, task: str, wanted: set) -> set:
        """Of the wanted (case, method, keep), those that an earlier run has asked. Begins a task."""
        done = wanted & {(r["case"], r["method"], r["keep"]) for r in self.records if r["task"] == task}
        if done:
            print(f"{task}: {len(done)} of {len(wanted)} caches were asked before and are skipped")
        self.fresh, self.task_start = [], time.perf_counter()
        return done

    def add(self, records: list[dict]) -> None:
        self.fresh += records
        if self.answers:
            append_records(self.answers, records)
        if self.out and not self.world.rank and time.perf_counter() - self.saved > 10:
            self.saved = time.perf_counter()  # how long it took so far; answers are safe
            write_result(self.out, self.result | {"seconds": self.seconds()})

    def finish(self, task: str) -> None:
        fresh = sorted(self.world.gather(self.fresh), key=lambda r: r["case"])
        self.records, self.result["seconds"] = self.records + fresh, self.seconds()
        print(f"{task}: {sum(len(r['answers']) for r in fresh)} answers from {len(fresh)} caches in "
              f"{time.perf_counter() - self.task_start:.0f} s")
        if self.world.rank:
            return
        contexts = {name: x.get("contexts") for name, x in self.result["settings"]["tasks"].items()}
        self.result["cells"] = cells_of(self.records, self.result["against"], contexts)
        if self.out:
            write_result(self.out, self.result)


def mean_and_interval(units, values, weights=None, share: bool = False, resamples: int = 1000
                      ) -> tuple[float, list[float]]:
    """Weighted mean of `values` and its 95 % bootstrap interval, with whole units (documents) drawn with replacement:
    answers about one document are not independent. Args: sequences of equal length.

    share: the values are judgements from 0 to 1. Where all of them are 0 (or 1), every resample agrees and a bootstrap
    would claim certainty; then it is Clopper and Pearson's exact interval for as many units: 0 of 20 is 0 to 0.17.
    """
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    _, unit = np.unique(np.asarray(list(units)), return_inverse=True)
    sums, counts = np.bincount(unit, np.asarray(values, float) * weights), np.bincount(unit, weights)
    mean = float(sums.sum() / counts.sum())
    if len(counts) < 2:
        return mean, [math.nan, math.nan]  # one unit says nothing about how much units differ
    if share and mean in (0, 1):
        bound = 0.025 ** (1 / len(counts))
        return mean, [0.0, 1 - bound] if mean == 0 else [bound, 1.0]
    drawn = np.random.default_rng(0).integers(0, len(counts), (resamples, len(counts)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return mean, [float(low), float(high)]


def rounded(interval) -> list[float] | None:
    return None if math.isnan(interval[0]) else [round(x, 5) for x in interval]


def finished(records: list[dict], contexts: dict[str, int]) -> list[dict]:
    """The records of those methods and kept fractions that were asked about all of a task's documents; contexts: how
    many these are, by task (where it is not known: as many as the best of them was asked about)."""
    seen = {}
    for r in records:
        seen.setdefault(r["task"], {}).setdefault((r["method"], r["keep"]), set()).add(r["case"])
    every = {task: contexts.get(task) or max(map(len, groups.values())) for task, groups in seen.items()}
    for task, groups in seen.items():
        half = [f"{m} {keep:g} ({len(cases)})" for (m, keep), cases in groups.items() if len(cases) < every[task]]
        if half:
            print(f"{task}: {every[task]} documents; left out, as asked about fewer: {', '.join(half)}")
    return [r for r in records if len(seen[r["task"]][r["method"], r["keep"]]) == every[r["task"]]]


def cells_of(records: list[dict], against: str | None = None, contexts: dict[str, int] = {}) -> list[dict]:
    """A cell for each task, kind (every prefix of its path, and "all"), method and keep; with `against`, also the
    differences to that method at the same keep, paired answer by answer. contexts: see `finished`."""
    tasks, groups = list(dict.fromkeys(r["task"] for r in records)), {}
    order = lambda r: (tasks.index(r["task"]), r["case"])  # noqa: E731; several processes append in any order
    for r in sorted(finished(records, contexts), key=order):
        for j, a in enumerate(r["answers"]):
            path = a["kind"].split("/")
            kinds = dict.fromkeys(["/".join(path[:n]) for n in range(len(path), 0, -1)] + ["all"])
            for kind in kinds:
                groups.setdefault((r["task"], kind, r["method"], r["keep"]), []).append((r, j, a))
    cells = []
    for (task, kind, method, keep), found in groups.items():
        units, weights = [r["unit"] for r, _, _ in found], [a["weight"] for _, _, a in found]
        contexts = list({r["case"]: r for r, _, _ in found}.values())
        cell = {"task": task, "kind": kind, "method": method, "keep": keep, "n": len(found), "contexts": len(contexts),
                **{x: round(float(np.mean([r[x] for r in contexts])), 1) for x in ("N", "K")},
                "cache_bytes": round(float(np.mean([r["bytes"] for r in contexts]))), "mean": {}, "ci95": {},
                "units": len(set(units)),
                "seconds": {x: round(float(np.median([r["seconds"][x] for r in contexts])), 4)
                            for x in ("prefill", "compress", "decode")}}
        other = {(r["case"], j): a for r, j, a in groups.get((task, kind, against, keeps_of(against, [keep])[0]), [])}
        pairs = [(a, other.get((r["case"], j))) for r, j, a in found]
        for metric in METRICS[task]:
            mean, ci = mean_and_interval(units, [a[metric] for _, _, a in found], weights, metric in SHARES)
            cell["mean"][metric], cell["ci95"][metric] = round(mean, 5), rounded(ci)
            if against and all(b for _, b in pairs):
                mean, ci = mean_and_interval(units, [a[metric] - b[metric] for a, b in pairs], weights)
                cell.setdefault("difference", {"against": against, "mean": {}, "ci95": {}})
                cell["difference"]["mean"][metric] = round(mean, 5)
                cell["difference"]["ci95"][metric] = rounded(ci)
        cells.append(cell)
    return cells


def with_interval(cell: dict, metric: str, form: str = ".3f") -> str:
    """Of a cell, or of its difference: the mean and its 95 % interval."""
    low_high, to = cell["ci95"][metric], ", " if "+" in form else "–"
    return f"{cell['mean'][metric]:{form}}" + (f" ({low_high[0]:{form}}{to}{low_high[1]:{form}})" if low_high else "")


def print_table(cells: list[dict]) -> None:
    """For each task and kind the headline metric with its interval: a row per method, a column per kept fraction, and
    the caches' bytes as stored; with --against, under each method's row its paired difference to that method."""
    for task in dict.fromkeys(c["task"] for c in cells):
        mine = [c for c in cells if c["task"] == task]
        metric = next(iter(METRICS[task]))
        for kind in sorted({c["kind"] for c in mine}, key=lambda k: (k.count("/"), k == "all", k)):
            at = {(c["method"], c["keep"]): c for c in mine if c["kind"] == kind}
            if "/" in kind or (kind != "all" and len({c["kind"] for c in mine}) == 2):
                continue
            keeps = sorted({keep for m, keep in at if m not in ("full", "none")}, reverse=True)
            some = next(iter(at.values()))
            print(f"\n{task} · {kind}: {metric} (95 %)    n = {some['n']} in {some['contexts']} documents of "
                  f"{some['N']:.0f} tokens")
            size = {keep: next(c["K"] for (_, k), c in at.items() if k == keep) for keep in keeps}
            print(f"{'':22}" + "".join(f"{f'keep {k}, K {size[k]:.0f}':>24}" for k in keeps) + "   kB of the caches")
            if "chance" in METRICS[task]:
                print(f"{'(chance)':22}" + f"{some['mean']['chance']:>24.3f}" * len(keeps))
            for m in dict.fromkeys(m for m, _ in at):
                row = [at.get((m, keep)) for keep in keeps_of(m, keeps)]
                print(f"{m:22}" + "".join(f"{with_interval(c, metric) if c else '':>24}" for c in row)
                      + "   " + " ".join(f"{c['cache_bytes'] / 1e3:.0f}" for c in row if c))
                gaps = [c.get("difference") if c else None for c in row]
                if any(d and d["against"] != m for d in gaps):
                    print(f"{'  less ' + next(d for d in gaps if d)['against']:22}"
                          + "".join(f"{with_interval(d, metric, '+.3f') if d else '':>24}" for d in gaps))
