"""What the numbers of a report say and what they can't, in plain words."""

from __future__ import annotations

import math

from e2kd.distance import Score
from e2kd.report.measuring import LayerScores, Measured, Pair

CLEAR = 3.0  # spreads by chance, or standard errors, that a value must be away to be spoken of
ADVISED = 64  # images
STEADY = 0.7  # correlation of maps among other companions
BLANK = 0.25  # share of blank maps that is many
SEEDS = (
    "Two networks of one and the same training, with other random numbers, lack some of each other's relevant features "
    "too: only what goes beyond that was transferred. Take a second base as the student to see how much it is."
)


def findings(measured: Measured) -> list[str]:
    """Sentences on the first pair, from its own numbers; then on what is missing."""
    pair = measured.pairs[0]
    said = [*_similar(pair), *_relevant(pair), *_answers(measured)]
    return [*said, *_undefined(pair), *measured.notes]


def limits(measured: Measured) -> list[str]:
    """What a reader should not conclude."""
    pair = measured.pairs[0]
    said = [
        f"All numbers are of the same {measured.n} images.{_by_chance(pair)} One pair of trained networks can't tell "
        "what another seed would give: compare several before calling a difference an effect of the training.",
        "FSS of early layers mostly shows the geometry of the images themselves. Only what lies above the curve of the "
        "untrained network was learned.",
        "Scores are bias-corrected and may be negative; values of the papers' tables are on another scale.",
        "A UniCAM map belongs to a batch: it shows where an image differs from its companions in a way that one "
        "network sees and the other does not. It is not evidence for a class, and each map is scaled to its own range.",
    ]
    if measured.n < ADVISED:
        said.append(f"{measured.n} images are few; {ADVISED} or more are advised.")
    if len(measured.pictures.classes) == 2:
        said.append("With two classes every embedding of the labels gives the same relevance.")
    return said + _blank_and_unsteady(pair)


def flags(layer: LayerScores) -> str:
    """What is to be kept in mind about a layer, in a table's cell.

    >>> flags(LayerScores(("a", "b"), {}, {}, (0.5, 0.0), (0.9, 0.4)))
    'distilled: 50 % blank; residual: depends on companions (.40)'
    """
    said = []
    for name, blank, steady in zip(("distilled", "residual"), layer.blank, layer.steady, strict=True):
        notes = [f"{blank:.0%} blank".replace("%", " %")] if blank > BLANK else []
        if steady < STEADY:
            notes.append(f"depends on companions ({steady:.2f})".replace("(0.", "(."))
        if notes:
            said.append(f"{name}: {', '.join(notes)}")
    reasons = {score.reason: None for score in layer.scores.values() if score.reason}
    return "; ".join([*said, *reasons])


def _similar(pair: Pair) -> list[str]:
    scored = [(layer, layer.scores["fss"]) for layer in pair.layers if not layer.scores["fss"].reason]
    if not scored:
        return []
    most, least = (pick(scored, key=lambda each: each[1].value) for pick in (max, min))
    student, base = pair.roles
    said = f"The {student}'s features are most like the {base}'s at {most[0].layers[0]} (FSS {_value(most[1])})"
    said += f" and least at {least[0].layers[0]} ({_value(least[1])})." if least is not most else "."
    plain = [layer.layers[0] for layer in pair.layers if _no_more_than_control(layer)]
    if plain:
        said += f" At {_listed(plain)} that is no more than an untrained network has in common with the {student}."
    return [said]


def _no_more_than_control(layer: LayerScores) -> bool:
    fss, control = layer.scores["fss"], layer.scores["fss_control"]
    if fss.reason or control.reason:
        return False
    return fss.value - control.value < CLEAR * math.hypot(fss.error, control.error)


def _relevant(pair: Pair) -> list[str]:
    """Where one network has relevant features that the other lacks."""
    said = []
    for name, (who, other) in (("rs_distilled", pair.roles), ("rs_residual", pair.roles[::-1])):
        scores = [(layer.layers[0], layer.scores[name]) for layer in pair.layers if name in layer.scores]
        clear = [(layer, score) for layer, score in scores if _is_clear(score)]
        if clear:
            layer, best = max(clear, key=lambda each: each[1].value)
            said.append(
                f"The {who} has features relevant to the labels that the {other} lacks at "
                f"{_listed([name for name, _ in clear])}, most at {layer} (RS {_value(best)})."
            )
        elif any(not score.reason for _, score in scores):
            said.append(f"Nothing relevant to the labels that the {who} has beyond the {other} stands out from chance.")
    if any("has features" in sentence for sentence in said):
        said.append(SEEDS)
    return said


def _by_chance(pair: Pair) -> str:
    """How far from 0 chance alone leads, where any layer could be measured."""
    known = [chance for layer in pair.layers if not math.isnan(chance := layer.scores["fss"].chance)]
    if not known:
        return ""
    return (
        f" Two independent networks would differ from 0 by about {known[0]:.3f} by chance; the ± is the standard error "
        "over the images."
    )


def _is_clear(score: Score) -> bool:
    return not score.reason and score.value > CLEAR * max(score.chance, score.error)


def _answers(measured: Measured) -> list[str]:
    said = []
    for pair in measured.pairs:
        if pair.agreement == pair.agreement:
            first, second = pair.roles
            cosine = (
                f"their explanations of it have a mean cosine of {pair.cosine:.2f}"
                if pair.cosine == pair.cosine
                else "their explanations of it can't be compared, as one's are all zero or not finite"
            )
            alike = f"{pair.agreement:.0%}".replace("%", " %")
            said.append(
                f"{first.capitalize()} and {second} put the same class first for {alike} of the images; {cosine}."
            )
    return said


def _undefined(pair: Pair) -> list[str]:
    reasons = {(name, score.reason) for layer in pair.layers for name, score in layer.scores.items() if score.reason}
    return [f"There is no {name}: {reason}." for name, reason in sorted(reasons)]


def _blank_and_unsteady(pair: Pair) -> list[str]:
    said = []
    if any(max(layer.blank) > BLANK for layer in pair.layers):
        said.append(
            "Blank maps are no error: the weights of a channel sum to 0 over the images, so that not every image can "
            "be seen by it. They are left out of the scores of perturbed images."
        )
    if any(steady < STEADY for layer in pair.layers for steady in layer.steady):
        said.append(
            f"Where the table says that maps depend on companions, the map of an image among other images is another "
            f"one (correlation below {STEADY}): look at many, or use more images."
        )
    return said


def _value(score: Score) -> str:
    return f"{score.value:.2f} ± {score.error:.2f}"


def _listed(names: list[str]) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
