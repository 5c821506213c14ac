"""Hugging Face's image classifiers, built from tiny configurations."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.families_models import CLASSES, Subject

SIZE = 64
TINY: dict[str, Any] = {
    "image_size": SIZE, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "patch_size": 8,
}  # fmt: skip
STAGES: dict[str, Any] = {"image_size": SIZE, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
WINDOWS: dict[str, Any] = {
    "image_size": SIZE, "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [2, 2, 4], "window_size": 4, "patch_size": 4,
}  # fmt: skip
PYRAMID: dict[str, Any] = {**STAGES, "num_attention_heads": [1, 2, 2, 4], "image_size": 128}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "beit": TINY,
    "bit": {**STAGES, "hidden_sizes": [32, 64, 96, 128], "embedding_size": 32, "image_size": 128, "num_groups": 8},
    "convnext": {**STAGES, "image_size": 128},
    "convnextv2": {**STAGES, "image_size": 128},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "data2vec-vision": TINY,
    "deit": TINY,
    "dinov2": {**TINY, "mlp_ratio": 2},
    "dinov2_with_registers": {**TINY, "mlp_ratio": 2},
    "efficientnet": {"image_size": 128, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "focalnet": {"image_size": 128, "embed_dim": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]},
    "hgnet_v2": {},
    "hiera": {"image_size": [128, 128], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    "ijepa": TINY,
    "levit": {"image_size": 256, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 2]},
    "mobilenet_v1": {"image_size": 128, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": 128, "depth_multiplier": 0.35},
    "mobilevit": {"image_size": 128, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 8, 16, 24, 32, 48, 64]},
    "mobilevitv2": {"image_size": 128, "width_multiplier": 0.5},
    "poolformer": {**STAGES, "image_size": 128},
    "pp_lcnet": {},
    "pvt": {**PYRAMID, "hidden_sizes": [16, 32, 48, 64]},
    "pvt_v2": {**PYRAMID, "image_size": 128},
    "regnet": {**STAGES, "hidden_sizes": [16, 32, 48, 64], "embedding_size": 16, "groups_width": 8, "image_size": 128},
    "resnet": {**STAGES, "embedding_size": 16, "layer_type": "basic", "image_size": 128},
    "segformer": PYRAMID,
    "swiftformer": {"image_size": 128, "depths": [1, 1, 2, 1], "embed_dims": [16, 32, 48, 64]},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "textnet": {"image_size": [128, 128]},
    "vit": TINY,
    "vit_msn": TINY,
    "siglip": {"vision_config": {**TINY}},
    "clip": {"vision_config": {**TINY}},
    "metaclip_2": {"vision_config": {**TINY}},
}


def hf_families() -> list[str]:
    """The model types with a tiny configuration here that this version of transformers knows."""
    return sorted(name for name in CONFIGURATIONS if _class_name(name))


def _class_name(family: str) -> str:
    """The image classifier of a model type, empty if this version has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(family, "")
    return found if isinstance(found, str) else str(found[0])


def hf_subject(family: str) -> Subject:
    """The image classifier of a model type, tiny and random."""
    import transformers

    options = CONFIGURATIONS[family]
    configuration = transformers.CONFIG_MAPPING[family](num_labels=CLASSES, **options)
    side = options.get("image_size", options.get("vision_config", {}).get("image_size", 128))
    size = side[0] if isinstance(side, list) else int(side)

    def build() -> nn.Module:
        model: nn.Module = getattr(transformers, _class_name(family))(configuration)
        return model

    return Subject(family, _class_name(family), size, build, options)
