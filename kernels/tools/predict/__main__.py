"""The table of predicted times: every kernel of the report's cases, in bf16, on each chip.

    TRITON_INTERPRET=0 python -P -m fastseg.kernels.tools.predict [--chip H200] [--case NAME] [--seconds N] [--tune]

Rows are written as they come, and replace those of the same case and chip; the page is made of all of them. A row holds
a digest of what it was made from (``fresh.py``): only cases whose code has changed are compiled.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from fastseg.kernels.runtime.ceilings import CHIPS
from fastseg.kernels.tools import cases
from fastseg.kernels.tools.predict import choose, fresh
from fastseg.kernels.tools.predict.model import BAND, Prediction, predict_on
from fastseg.kernels.tools.report import TARGETS, Launched

DTYPE = torch.bfloat16
PREDICTABLE = [name for name, chip in CHIPS.items() if chip.arch in TARGETS and chip.arch.startswith("sm_")]
FIRST = "H200"  # the chip that gets every case; the others get the first case of each kernel
HEAD = f"""# Predicted times

Nothing on this page is measured: these are times by a static model of the compiled code, with a band of {BAND} until
a device has calibrated it. `make predict` writes the page; `kernels/tools/predict/` says how.

Cases are those of `make kernel-report`, all of them on an H200 and some on other chips, in bf16, with Triton's code for
the chip. Some hold thousands of images, so that a map has more than 2^31 elements: take the share of yours. A row is
one launch. What binds is the longest of the model's terms, whose share of the time stands behind it; then the next
longest. `~`: how often a loop runs is decided by what memory holds, and is assumed. `*`: of earlier code.

"""


def trips(case: str, launched: Launched) -> Mapping[str, float]:
    """Of a case's loops whose ends are in memory, by their variables, where the case's file says so."""
    topic = next(topic for topic in cases.TOPICS if case in topic.CASES)
    return topic.trips(case, launched.report.config) if hasattr(topic, "trips") else {}


def row(case: str, chip: str, prediction: Prediction, code: str) -> dict[str, object]:
    terms = sorted(prediction.terms, key=prediction.terms.__getitem__, reverse=True)
    return {
        "case": case, "chip": chip, "kernel": prediction.kernel.strip("_").removesuffix("_kernel"),
        "config": {k: v for k, v in prediction.config.items() if k.startswith(("BLOCK", "num_"))},
        "us": round(prediction.us, 1), "bound": prediction.bound, "programs": prediction.programs,
        "blocks": prediction.blocks, "assumed": prediction.assumed, "code": code,
        "terms": {name: round(prediction.terms[name] * 1e6, 1) for name in terms if prediction.terms[name]},
    }  # fmt: skip


def first_cases() -> list[str]:
    """The cases that reach a kernel which no case before them reaches."""
    seen: set[str] = set()
    chosen = []

    def on_launch(case: str) -> None:
        from fastseg.kernels.runtime.launch import intercept

        found: set[str] = set()
        with intercept(lambda kernel, *_: found.add(kernel.fn.__name__)):
            cases.CASES[case](DTYPE)
        if found - seen:
            chosen.append(case)
        seen.update(found)

    for case in cases.CASES:
        on_launch(case)
    return chosen


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, rows: Iterable[dict], case: str, chip: str) -> list[dict]:
    """Put the rows of a case and chip into the file, in the order of the cases."""
    order = {name: i for i, name in enumerate(cases.CASES)}
    kept = [r for r in read(path) if (r["case"], r["chip"]) != (case, chip) and r["case"] in order] + list(rows)
    kept.sort(key=lambda r: (list(CHIPS).index(r["chip"]), order[r["case"]]))
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in kept) + "\n]\n")
    return kept


def page(rows: Sequence[Mapping], old: Callable[[str, str], bool] = lambda case, chip: False) -> str:
    """The rows as a page, a table for each chip; ``old``: whether those of a case and chip are of earlier code."""
    parts = [HEAD]
    for chip in dict.fromkeys(r["chip"] for r in rows):
        source = CHIPS[chip]
        parts.append(f"## {chip} ({source.arch}; {source.bandwidth / 1e12:.2f} TB/s)\n\n")
        parts.append(
            "| case | kernel | configuration | programs | us | binds |\n| --- | --- | --- | --- | --- | --- |\n"
        )
        for r in (r for r in rows if r["chip"] == chip):
            config = " ".join(f"{_short(name)}{value}" for name, value in r["config"].items())
            longest = list(r["terms"].items())[:2]
            binds = ", ".join(f"{name} {us / max(r['us'], 0.1):.0%}" for name, us in longest)
            us = f"{'~' * r['assumed']}{r['us']:,}{'*' * old(r['case'], r['chip'])}"
            parts.append(f"| {r['case']} | {r['kernel']} | {config} | {r['programs']} | {us} | {binds} |\n")
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _short(name: str) -> str:
    return {"num_warps": "warps ", "num_stages": "stages "}.get(name, name.removeprefix("BLOCK_") + " ")


def tune(chips: Iterable[str]) -> int:
    """Write what is clearly better than a heuristic into ``kernels/tuned``; 0."""
    for chip in chips:
        for kernel, work in choose.WORK.items():
            for fn in work:
                for choice in choose.choose(kernel, fn, CHIPS[chip]):
                    said = f"{choice.row} on {chip}: {choice.heuristic_us:.1f} us by the heuristic, {choice.us:.1f} us"
                    print(f"{said} by {choice.values}{': taken' if choice.clear else ''}", flush=True)
                    if choice.clear:
                        choose.write(choice, CHIPS[chip])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, and write rows and page; 1 if a case failed."""
    parser = argparse.ArgumentParser(description="Times of every kernel by a static model; nothing is measured.")
    parser.add_argument("--chip", action="append", choices=PREDICTABLE, help="may be repeated; all without it")
    parser.add_argument("--case", action="append", choices=cases.CASES, help="may be repeated; all without it")
    parser.add_argument("--rows", type=Path, default=Path("docs/predicted.json"), help="file of rows")
    parser.add_argument("--page", type=Path, default=Path("docs/predicted.md"), help="page made of the rows")
    parser.add_argument("--all", action="store_true", help="cases whose code is unchanged too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no case is begun")
    parser.add_argument("--tune", action="store_true", help="write configurations that are clearly better instead")
    options = parser.parse_args(argv)
    if options.tune:
        return tune(options.chip or [FIRST])
    deadline, failed, left = time.monotonic() + options.seconds, False, 0
    firsts = first_cases()
    old = Old(read(options.rows))
    for case in options.case or sorted(cases.CASES, key=lambda case: case not in firsts):
        names = PREDICTABLE if case in firsts or options.case else [FIRST]
        names = [n for n in names if n in (options.chip or names) and (options.all or old(case, n))]
        for arch in dict.fromkeys(CHIPS[name].arch for name in names):
            chips = [CHIPS[name] for name in names if CHIPS[name].arch == arch]
            if time.monotonic() > deadline:
                left += len(chips)
                continue
            launch = partial(cases.CASES[case], DTYPE)
            try:
                found = predict_on(launch, chips, partial(trips, case))
            except RuntimeError as error:
                print(f"{case} for {arch}: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            for chip in chips:
                codes = old.digests(case, chip.name)
                made = [row(case, chip.name, p, code) for p, code in zip(found[chip.name], codes, strict=True)]
                old.take(write(options.rows, made, case, chip.name))
                said = ", ".join(f"{p.us:.1f} us ({p.bound})" for p in found[chip.name])
                print(f"{case} on {chip.name}: {said}", flush=True)
            options.page.write_text(page(read(options.rows), old))
    print(f"{left} cases and chips are left: no time" if left else "every row is of the code that is there")
    return int(failed)


class Old:
    """Whether the rows of a case and chip are not of the code that is there; none is old too."""

    def __init__(self, rows: Iterable[Mapping]):
        self._digests: dict[tuple[str, str], list[str]] = {}
        self.take(rows)

    def take(self, rows: Iterable[Mapping]) -> None:
        self._codes: dict[tuple[str, str], list[str]] = {}
        for r in rows:
            self._codes.setdefault((r["case"], r["chip"]), []).append(r.get("code", ""))

    def __call__(self, case: str, chip: str) -> bool:
        return self._codes.get((case, chip)) != self.digests(case, chip)

    def digests(self, case: str, chip: str) -> list[str]:
        if (case, chip) not in self._digests:
            self._digests[case, chip] = fresh.digests(partial(cases.CASES[case], DTYPE), CHIPS[chip])
        return self._digests[case, chip]


if __name__ == "__main__":
    sys.exit(main())
