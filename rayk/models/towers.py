"""The text of multimodal models: what their images and sound go through is left out of memory."""

from __future__ import annotations

from typing import Any

from torch import nn


def drop(model: Any) -> list[str]:
    """Take out of the model what does not belong to its text; the names of what went. It has been loaded, on the host.

    Text goes through the decoder and the head; whatever stands beside the decoder, on its way down from the model, is
    an encoder or a projector of something else. The trial that follows shows whether the text needed it.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    needed = {id(module) for module in (decoder, model.get_output_embeddings(), model.get_input_embeddings())}
    gone = []
    for parent in _path(model, decoder)[:-1]:
        for name, child in list(parent.named_children()):
            if needed.isdisjoint(map(id, child.modules())) and any(p.dim() > 1 for p in child.parameters()):
                setattr(parent, name, None)
                gone.append(name)
    return gone


def _path(model: nn.Module, wanted: nn.Module) -> list[nn.Module]:
    """From the model down to that module, both included; the model alone where that is not below it."""
    for name, module in model.named_modules():
        if module is wanted and name:
            steps, at = [model], model
            for part in name.split("."):
                at = at.get_submodule(part)
                steps.append(at)
            return steps
    return [model]
