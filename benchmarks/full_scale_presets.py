"""The hyper-parameters of the papers' tables, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

RELEASED = "budget, optimizer and augmentation as in the authors' released configuration"
IN_PART = (
    "augmentation as in the authors' released code; the budget, which is not, as on ImageNet: set --epochs and --lr"
)
NOT_RELEASED = "no configuration was released: ImageNet's, set --epochs and --lr"


@dataclass(frozen=True)
class Recipe:
    """How a student is trained. Every field is a command-line option of `benchmarks.full_scale` as well.

    Attributes:
        table: which of the paper's it belongs to.
        data: the layout it was made for.
        teacher, student: names, as `full_scale_networks.network` takes them.
        per_class: training images of each class; None takes all.
        held_out: training images of each class that are kept from all students, to choose settings on, where the data
            set has no others for that.
        epochs, batch: the batch is that of all processes together.
        warmup: epochs over which the learning rate rises from a hundredth, before its cosine.
        optimizer: "AdamW" or "Adam".
        lr, weight_decay: its.
        clip: largest norm of the gradient; None leaves it.
        adaptive_clip: largest share of each weight's norm that its gradient may have (AGC); None leaves it.
        size: side of the images.
        least_area: of a random crop, as a share of the image.
        rand_augment: its magnitude; None leaves it out.
        resize: "image" compares maps at the image's size, as the authors' code; None on the student's grid.
        temperatures, weights: τ and λ that the paper chooses from; KD of several classes has no τ.
        unrelated: whether it distils on images of another data set.
        source: where the numbers come from.
    """

    table: str
    data: str
    teacher: str
    student: str
    per_class: int | None = None
    held_out: int = 50
    epochs: int = 200
    batch: int = 256
    warmup: float = 5
    optimizer: str = "AdamW"
    lr: float = 0.01
    weight_decay: float = 1e-4
    clip: float | None = 1.0
    adaptive_clip: float | None = None
    size: int = 224
    least_area: float = 0.08
    rand_augment: int | None = None
    resize: str | None = "image"
    temperatures: tuple[float, ...] = (1.0, 5.0)
    weights: tuple[float, ...] = (1.0, 5.0, 10.0)
    unrelated: bool = False
    source: str = field(default=RELEASED, repr=False)


STANDARD = Recipe("e²KD, Tables 1 to 3: standard", "imagenet", "torchvision.resnet34", "resnet18")
BCOS = replace(
    STANDARD,
    table="e²KD, Tables 1 to 3: B-cos", teacher="bcos.official", student="bcos.resnet18",
    optimizer="Adam", lr=1e-3, weight_decay=0.0, clip=None, adaptive_clip=0.01, weights=(0.2, 1.0, 5.0, 10.0),
)  # fmt: skip
WATERBIRDS = replace(
    STANDARD,
    table="e²KD, Fig. 2 and Table 4: standard", data="waterbirds", teacher="resnet50", held_out=0, least_area=0.7,
    source=IN_PART,
)  # fmt: skip
VOC = replace(
    STANDARD,
    table="e²KD, Table 5 left: standard", data="voc", teacher="resnet50", held_out=25, batch=64,
    temperatures=(1.0,), source=IN_PART,
)  # fmt: skip


def few_shot(recipe: Recipe, per_class: int) -> Recipe:
    """The same on 50 or 200 images of each class: about as many steps in either."""
    epochs, batch = {50: (250, 32), 200: (125, 64)}[per_class]
    return replace(recipe, per_class=per_class, epochs=epochs, batch=batch)


def as_bcos(recipe: Recipe) -> Recipe:
    """The same for B-cos networks."""
    changed = {name: getattr(BCOS, name) for name in BCOS_FIELDS}
    return replace(recipe, table=recipe.table.replace("standard", "B-cos"), **changed)


BCOS_FIELDS = ("teacher", "student", "optimizer", "lr", "weight_decay", "clip", "adaptive_clip", "weights")
PRESETS = {
    "imagenet": STANDARD,
    "imagenet-50-shot": few_shot(STANDARD, 50),
    "imagenet-200-shot": few_shot(STANDARD, 200),
    "imagenet-bcos": BCOS,
    "imagenet-bcos-50-shot": few_shot(BCOS, 50),
    "imagenet-bcos-200-shot": few_shot(BCOS, 200),
    # 10,000 steps of warm-up are two epochs
    "imagenet-bcos-vit": replace(
        BCOS, table="e²KD, Fig. 5", student="bcos.vit_ti", epochs=150, warmup=2, rand_augment=10
    ),
    "imagenet-unrelated": replace(BCOS, table="e²KD, Table 5 right", unrelated=True, source=NOT_RELEASED),
    "waterbirds": WATERBIRDS,
    "waterbirds-bcos": as_bcos(WATERBIRDS),
    "voc": VOC,
    "voc-bcos": as_bcos(VOC),
    "sun397": replace(STANDARD, table="none", data="sun397", teacher="resnet50", held_out=5, source=NOT_RELEASED),
    "plantvillage": replace(
        STANDARD, table="UniCAM, Plant Disease", data="plantvillage", teacher="resnet50", batch=64, source=NOT_RELEASED
    ),
}
