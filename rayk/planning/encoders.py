"""Encoders of images beside a text model, by their fields or by their published names."""

from __future__ import annotations

from collections.abc import Mapping

from rayk.planning.architectures import vision_tower
from rayk.planning.config_fields import Fields
from rayk.planning.errors import ModelConfigError
from rayk.planning.weights import Kind, Module, Weights

ENCODERS = {  # published encoders: parameters, and elements of a patch
    "clip-vit-large-patch14-336": (303_507_456, 1024),
    "siglip-so400m-patch14-384": (428_225_600, 1152),
}


def named_encoder(f: Fields, hidden: int) -> Module | None:
    """An encoder that the file gives by name only, and two layers that lead from it into the text model."""
    images = f.values.get("img_processor")
    name = images.get("model_name") if isinstance(images, Mapping) else f.values.get("mm_vision_tower")
    found = ENCODERS.get(str(name).rpartition("/")[2])
    if found is None:
        return None
    joined = 4 if isinstance(images, Mapping) else 1  # Phi-3 joins four patches
    return Module("vision_tower", Kind.rest, found[0] + hidden * (joined * found[1] + hidden + 2))


def with_encoder(f: Fields, weights: Weights, hidden: int, notes: list[str]) -> Weights:
    """The text model's weights and those of the vision encoder, if its fields are the usual ones."""
    try:
        return Weights.of([*weights.modules, vision_tower(_encoder(f.part("vision_config")), hidden)])
    except ModelConfigError:
        notes.append("only the text model's weights are counted; an encoder beside it is not")
        return weights


def _encoder(part: Fields) -> Fields:
    """With the usual fields: DeepSeek-VL2 has timm's name, which ends with the size of its images; Kimi a grid."""
    grid, patch = (part.values.get(n) for n in ("init_pos_emb_height", "patch_size"))
    if not part.has("image_size") and isinstance(grid, int) and isinstance(patch, int):
        return Fields(part.path, {**part.values, "image_size": grid * patch})
    width, ratio, name = (part.values.get(n) for n in ("width", "mlp_ratio", "model_name"))
    if not isinstance(width, int) or not isinstance(ratio, (int, float)):
        return part
    image = str(name).rpartition("_")[2]
    size = {"hidden_size": width, "intermediate_size": round(width * ratio)}
    more = {"num_hidden_layers": part.values.get("layers"), "image_size": int(image) if image.isdigit() else None}
    return Fields(part.path, {**part.values, **size, **more})
