"""What a cache holds and how it was made, in words."""

from __future__ import annotations

import json
from typing import Any

from e2kd.errors import shape
from e2kd.frozen.progress import progress_bar
from e2kd.frozen.teacher import FrozenTeacher

WHOSE = {"teacher": "the teacher's class", "labels": "the labels' class", "all": "every class"}


def describe(frozen: FrozenTeacher) -> str:
    """A printable description.

    >>> import tempfile, torch
    >>> from e2kd.frozen import freeze
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 3, 2, 2), torch.arange(8) % 5)
    >>> print(describe(freeze(net, data, tempfile.mkdtemp(), maps=False, progress=False)).splitlines()[0])
    teacher      Sequential (float32)
    """
    plan, record = frozen.plan, frozen.store.record
    teacher, explainer, view = plan["teacher"], plan["explainer"], plan["view"]
    lines = {
        "teacher": f"{teacher['name']} ({teacher['type']})",
        "weights": teacher["weights"],
        "input": f"{_size(teacher['size'])}, normalised with {json.dumps(teacher['normalization'])}",
        "view": f"{shape(view['image'])} {view['type']}, {view['fit']}",
        "images": f"{len(frozen):,}, known by {plan['dataset']['ids']}",
        "classes": _classes(frozen),
        "logits": "all, float16" if record.top is None else f"the {record.top} largest, and the rest as one",
        "maps": "none",
        "size": f"{record.row_bytes:,} bytes a row, {record.row_bytes * len(frozen) / 1e6:,.1f} MB",
    }
    if explainer is not None and record.map_shape is not None:
        place = f" at {explainer['layer']}" if explainer["layer"] else ""
        lines["maps"] = (
            f"{explainer['name']}{place} of {WHOSE[plan['classes']]}, {shape(record.map_shape)} {record.map_type}"
            f"; {frozen.store.zero_maps:,} of {record.map_count * len(frozen):,} zero everywhere"
        )
    return "\n".join(f"{name:13}{said}" for name, said in lines.items())


def _size(size: Any) -> str:
    return "as the view" if size is None else "x".join(map(str, size))


def _classes(frozen: FrozenTeacher) -> str:
    names = frozen.class_names
    if names is None:
        return f"{frozen.num_classes}"
    return f"{frozen.num_classes}; the data set's: {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"


def read_all(frozen: FrozenTeacher) -> str:
    """Verify every byte; returns a sentence, raises for damage."""
    with progress_bar("reading", len(frozen), shown=True, unit="rows") as advance:
        frozen.store.check(advance)
    return f"all {len(frozen):,} rows are as they were written"
