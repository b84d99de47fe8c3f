"""What a measurement says: how each part went, and every number beside its target."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bench.records import Record, Results
from bench.runner import PASSED


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number that is asked for, and where it is found."""

    name: str
    goals: tuple[float, ...]
    """Bounds, the first to be reached first."""
    what: str
    case: str = ""
    number: str = "ms"
    """A number of the record by name, or `ms`."""
    against: str = ""
    """The ratio of this form's milliseconds to ours, instead of a number."""
    least: bool = False
    """Whether the number must be at least its goal, not at most."""
    scale: float = 1.0

    def measured(self, records: Sequence[Record]) -> float | None:
        """The number, or None if it was not measured."""
        found = {r.form: r for r in records if (r.what, r.case) == (self.what, self.case)}
        ours, other = found.get("ours"), found.get(self.against)
        if ours is None or (self.against and other is None):
            return None
        if self.against and other is not None:
            return other.ms / ours.ms if other.ms and ours.ms else None
        value = ours.ms if self.number == "ms" else ours.numbers.get(self.number)
        return None if value is None else self.scale * value


STEP, PAIR = "training step", "recurrent pair"
TARGETS = (
    Target(name="main job: kNN gain, points", goals=(0.0,), what="main job", case="demo",
           number="gain, points", least=True),
    Target(name="BiGRU 3x1024, ms per step", goals=(16.0, 10.5), what=STEP, case="bigru"),
    Target(name="own, ms per step", goals=(0.7,), what=STEP, case="own"),
    Target(name="loss, gradients and ascent, µs", goals=(60.0, 30.0), what="loss, gradients and ascent",
           scale=1e3),
    Target(name="public-style trainer, times ours", goals=(80.0,), what="whole step and a public trainer's",
           against="public", least=True),
    *(Target(name=f"cuDNN, times ours: {case}", goals=(1.0,), what=PAIR, case=case, against="cudnn",
             least=True) for case in ("forward", "forward and backward", "forward and the input's gradient")),
    *(Target(name=f"tensors that differ: {case}", goals=(0.0,), what="equal bits", case=case,
             number="that differ") for case in ("two runs", "after a resume")),
)  # fmt: skip


def table(results: Results) -> str:
    """The whole report, as text."""
    lines = [
        results.caption,
        "",
        *_parts(results),
        "",
        *_targets(results.records),
        "",
        *_numbers(results.records),
    ]
    failed = [o for o in results.parts if o.outcome != PASSED]
    for o in failed:
        lines += ["", f"--- {o.part}: {o.outcome}", *(f"    {line[:160]}" for line in o.note.splitlines())]
    lines += ["", f"{len(results.parts) - len(failed)} of {len(results.parts)} parts passed"]
    return "\n".join(lines) + "\n"


def _parts(results: Results) -> list[str]:
    return [f"{'part':40}{'outcome':>12}{'s':>8}"] + [
        f"{o.part:40}{o.outcome:>12}{o.seconds:8.1f}  {o.note.splitlines()[-1][:60] if o.note else ''}"
        for o in results.parts
    ]


def _targets(records: Sequence[Record]) -> list[str]:
    lines = [f"{'target':52}{'measured':>10}  asked for"]
    for target in TARGETS:
        value, sign = target.measured(records), ">=" if target.least else "<="
        asked = f"{sign} " + ", then ".join(f"{goal:g}" for goal in target.goals)
        if value is None:
            lines.append(f"{target.name:52}{'':>10}  {asked}: not measured")
            continue
        reached = sum(value >= goal if target.least else value <= goal for goal in target.goals)
        verdict = "reached" if reached == len(target.goals) else "the first reached" if reached else "MISSED"
        lines.append(f"{target.name:52}{value:10.4g}  {asked}: {verdict}")
    return lines


def _numbers(records: Sequence[Record]) -> list[str]:
    """A line per problem: its forms side by side, each with its ratio to the first."""

    def problem(record: Record) -> tuple[str, str]:
        sizes = " ".join(f"{name} {value}" for name, value in record.sizes.items())
        return record.subject, sizes

    lines = []
    for (subject, sizes), some in itertools.groupby(records, problem):
        forms = list(some)
        first = forms[0].ms
        told = [_form(r, first) for r in forms]
        lines.append(f"{subject} ({sizes}): " + " · ".join(text for text in told if text))
        for record in forms:
            rest = {**{f"{name} ms": ms for name, ms in record.phases.items()}, **record.numbers}
            if rest:
                lines.append(f"    {record.form}: " + " · ".join(f"{n} {v:.4g}" for n, v in rest.items()))
    return lines


def _form(record: Record, first: float | None) -> str:
    told = [record.form]
    if record.ms is not None:
        ratio = f" ({record.ms / first:.1f}x)" if first and record.ms != first else ""
        told.append(f"{record.ms:.4g} ms{ratio}")
    if record.per_second is not None:
        told.append(f"{record.per_second:,.0f}/s")
    if record.MiB is not None:
        told.append(f"{record.MiB:,.0f} MiB")
    return " ".join(told)
