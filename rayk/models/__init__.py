"""Hugging Face checkpoints on pages.

model = load_model("folder")                       # config, safetensors, tokenizer
params = model.cache_params(page_size=16, enable_prefix_caching=True)
logits = model.logits(shard_inputs, tokens, counts)
"""

from rayk.models.load import load_model
from rayk.models.model import PagedModel

__all__ = ["PagedModel", "load_model"]
