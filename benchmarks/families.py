"""Coverage: one small classifier of every architecture family as student and as teacher, alive and right or refused.

    python -m benchmarks.families                     # everything, minutes
    python -m benchmarks.families --quick             # a dozen families
    python -m benchmarks.families --only tnt pit      # these alone
    python -m benchmarks.families --resume            # go on where the last run stopped
    python -m benchmarks.families --fresh             # choose the smallest model of each family anew

Each family runs in a process of its own with a time limit. Results: benchmarks/results/families.json and .md.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import families_hf, families_models
from benchmarks.common import RESULTS, environment, markdown_table, read_rows, write_results
from benchmarks.families_checks import check_student, check_teacher, silence
from benchmarks.families_models import NoClassifier, Subject
from e2kd.errors import UnsupportedModel

Row = dict[str, Any]
SECTIONS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Subject]]] = {
    "timm": (families_models.timm_families, families_models.timm_subject),
    "torchvision": (families_models.torchvision_families, families_models.torchvision_subject),
    "transformers": (families_hf.hf_families, families_hf.hf_subject),
}
QUICK = (
    "resnet", "densenet", "convnext", "efficientnet", "vision_transformer", "deit", "swin_transformer", "levit",
    "mlp_mixer", "xcit", "crossvit", "tnt", "pit",
)  # fmt: skip
REFERENCE, DIFFERENCE = 1e-4, 1e-3  # largest relative errors of gradients that count as right
MAPS = 1e-3  # the same for the teacher's maps, in float32
ALIVE = 0.9  # share of the parameter tensors before the site that get a gradient
MOVES = 0.02  # of the image's side: how far the centre of what a corner cell sees must move to the next corner
COMMON = 0.6  # share of their dependence that all corner cells have in common, from which they can't be told apart
REFUSED = "refused"


def run_family(section: str, family: str, known: Row | None = None) -> Row:
    """The row of one family: facts, verdict, and a sentence where it does not work.

    An earlier row of it tells which model to take, which saves building all of them to find the smallest.
    """
    row: Row = {"section": section, "family": family}
    began = time.perf_counter()
    try:
        if section == "timm" and known and "model" in known:
            subject = families_models.timm_named(family, known["model"], known["size"], known["options"])
        else:
            subject = SECTIONS[section][1](family)
    except NoClassifier as error:
        return row | {"verdict": "no classifier", "sentence": str(error)}
    row |= {"model": subject.name, "size": subject.size, "options": subject.options}
    row |= _attempt("student", lambda: check_student(subject, _small()))
    row |= _attempt("teacher", lambda: check_teacher(subject, _small()))
    row["seconds"] = round(time.perf_counter() - began, 1)
    row["verdict"], sentence = judge(row)
    return row | ({"sentence": sentence} if sentence else {})


def _small() -> torch.nn.Module:
    import timm

    torch.manual_seed(1)
    return timm.create_model("resnet18", num_classes=families_models.CLASSES)


def _attempt(side: str, check: Callable[[], Row]) -> Row:
    try:
        return check()
    except UnsupportedModel as error:
        return {f"{side}_refused": str(error)}
    except Exception as error:  # a crash is a result too
        return {f"{side}_error": f"{type(error).__name__}: {str(error)[:600]}"}


def judge(row: Row) -> tuple[str, str | None]:
    """The verdict ("works", "refused", "error", "dead", "wrong") and what is the matter."""
    for kind in ("error", REFUSED):
        for side in ("student", "teacher"):
            if f"{side}_{kind}" in row:
                return kind, f"as {side}: {row[f'{side}_{kind}']}"
    if not row["step_finite"] or row["alive"] < ALIVE:
        return "dead", f"{row['alive']:.0%} of {row['trunk_tensors']} parameter tensors get a gradient"
    if min(row["reference_error"] / REFERENCE, row["difference_error"] / DIFFERENCE) > 1:
        return "wrong", "the student's gradients differ from the reference and from finite differences"
    if not max(row["maps_error"], row["logits_error"]) <= MAPS:
        return "wrong", "the teacher's maps or logits differ from the reference"
    if placed(row) == "wrong":
        return "misplaced", f"cells and pixels disagree: {row['corners']}, {row['along']}, {row['across']}"
    return "works", None


def placed(row: Row) -> str:
    """Whether the cells of the map lie where their pixels do: "right", "wrong" or "unclear"."""
    if row["along"] >= max(MOVES, 2 * row["across"]):
        return "right"
    return "unclear" if row["layout"] == "NCHW" or row.get("common", 0) >= COMMON else "wrong"


def _child(section: str, family: str, known: Row | None, answer: Connection) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    silence()
    answer.send(run_family(section, family, known))


def in_process(section: str, family: str, known: Row | None, limit: float) -> Row:
    """`run_family` in a forked process that may crash or hang without harm."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(section, family, known, there))
    process.start()
    there.close()
    try:
        if here.poll(limit):
            return here.recv()
        return _failed(section, family, f"no result after {limit:.0f} seconds")
    except EOFError:
        process.join()
        return _failed(section, family, f"the process died with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _failed(section: str, family: str, sentence: str) -> Row:
    return {"section": section, "family": family, "verdict": "error", "sentence": sentence}


def sweep(wanted: list[tuple[str, str]], rows: list[Row], limit: float, jobs: int, name: str) -> list[Row]:
    """Run families, writing the results after each."""
    known = {(row["section"], row["family"]): row for row in rows}
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(in_process, *pair, known.get(pair), limit) for pair in wanted]):
            row = done.result()
            rows = [r for r in rows if (r["section"], r["family"]) != (row["section"], row["family"])] + [row]
            rows.sort(key=lambda r: (list(SECTIONS).index(r["section"]), r["family"]))
            write_results(name, rows, thresholds={"alive": ALIVE, "reference": REFERENCE, "difference": DIFFERENCE})
            (RESULTS / f"{name}.md").write_text(report(rows), encoding="utf-8")
            print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    facts = [row.get(k) for k in ("model", "size", "site", "layout", "grid", "way", "zero_maps", "alive")]
    errors = [
        row.get(k)
        for k in ("reference_error", "difference_error", "maps_error", "corners", "along", "across", "seconds")
    ]
    return f"{row['section']}/{row['family']}: {row['verdict']} {facts} {errors} {row.get('sentence', '')}"


def report(rows: list[Row]) -> str:
    """The Markdown page."""
    parts = ["# Architecture coverage", INTRODUCTION, " · ".join(f"{k} {v}" for k, v in environment().items() if v)]
    for section in SECTIONS:
        mine = [row for row in rows if row["section"] == section]
        if mine:
            parts += [f"## {section}", summary(mine), markdown_table(HEADER, [_cells(row) for row in mine])]
            parts += [f"- **{r['family']}** ({r['verdict']}): {r['sentence']}" for r in mine if r.get("sentence")]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = f"""One small classifier of each family, random weights, 10 classes, the smallest input with at least
9 cells. Each is the student of a ResNet-18 and its teacher. *Zero*: share of the batch whose GradCAM map is zero in the
first step; maps of random networks often are, so images are drawn up to four times until one is not, and a fifth time
with noise in the head where it begins as zeros (marked *). *Alive*: share of the parameter tensors before the site
that get a gradient from the explanation term alone (at least {ALIVE:.0%}). *Reference* and *differences*: relative
error of its gradients, in float64 and train mode with no dropout and fixed BatchNorm statistics, against
differentiating the model's own logits through a plain hook (at most {REFERENCE:g}), and of a directional derivative
against central finite differences of the whole procedure (at most {DIFFERENCE:g}); one of the two must hold. For both,
GradCAM is taken without its final ReLU, and parameters that begin as zeros get small noise. *Teacher*: relative error
of the maps of `e2kd.explain`, float32. *Corners*: smallest share, over the four corner cells, of a cell's dependence on
the pixels in its own quadrant of the image (a quarter by chance; small where the network mixes all cells or pads on one
side). *Moves*: how far, as a share of the image's side, the centre of that dependence moves with the cell: at least
{MOVES:g} and twice its movement in the other direction. Where it does not (marked ?), an NCHW layout still has no axes
to mistake; another layout fails unless the four corner cells have {COMMON:.0%} of their dependence in common, as in
random networks that mix all cells evenly."""
HEADER = [
    "family", "model", "input", "site", "layout", "grid", "way", "zero", "alive", "reference", "differences", "teacher",
    "corners", "moves", "step s", "verdict",
]  # fmt: skip


def _cells(row: Row) -> list[Any]:
    keys = ("family", "model", "size", "site", "layout", "grid", "way")
    zero = f"{row['zero_maps']}{'*' * row['head_begins_as_zeros']}" if "zero_maps" in row else None
    corner = min(row["corners"]) if row.get("corners") else None
    last = [
        zero,
        row.get("alive"),
        row.get("reference_error"),
        row.get("difference_error"),
        row.get("maps_error"),
        corner,
        _moves(row),
        row.get("step_seconds"),
        row["verdict"],
    ]
    return [row.get(key) for key in keys] + last


def _moves(row: Row) -> str | None:
    return f"{row['along']:.2g}{'' if placed(row) == 'right' else '?'}" if {"along", "layout"} <= set(row) else None


def summary(rows: Iterable[Row]) -> str:
    """How many work, in one line."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    classifiers = sum(n for verdict, n in counts.items() if verdict != "no classifier")
    works = counts.get("works", 0)
    others = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()) if verdict != "works")
    rate = works / max(classifiers, 1)
    return f"{works} of {classifiers} classifier families work out of the box ({rate:.1%}); others: {others or 'none'}."


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", default=(), help="these families, in any section")
    parser.add_argument("--section", choices=SECTIONS, help="one section alone")
    parser.add_argument("--quick", action="store_true", help="a dozen timm families")
    parser.add_argument("--resume", action="store_true", help="keep rows that the results file already has")
    parser.add_argument("--fresh", action="store_true", help="forget the results file, choose the models anew")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one family")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--name", default="families", help="name of the results files")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    only = QUICK if chosen.quick else chosen.only
    sections = [chosen.section] if chosen.section else ["timm"] if chosen.quick else list(SECTIONS)
    wanted = [(s, f) for s in sections for f in SECTIONS[s][0]() if not only or f in only]
    rows = [] if chosen.fresh else read_rows(chosen.name)
    done = {(row["section"], row["family"]) for row in rows} if chosen.resume else set()
    rows = sweep([pair for pair in wanted if pair not in done], rows, chosen.timeout, chosen.jobs, chosen.name)
    for section in sections:
        print(f"{section}: {summary([row for row in rows if row['section'] == section])}")


if __name__ == "__main__":
    sys.exit(main())
