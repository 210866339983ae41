"""Small random checkpoints of every kind, written to a folder and loaded back, and rows of tokens on pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.runtime_inputs import ShardInputs
from rayk.models import PagedModel

VOCAB, POSITIONS, WINDOW = 151, 1024, 24


def common(**changes: Any) -> dict[str, Any]:
    """initializer_range: large enough for attention that is far from uniform and for logits that differ."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", common()),
    "mistral": ("MistralConfig", common(sliding_window=WINDOW)),
    "qwen2": ("Qwen2Config", common(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": ("Qwen3Config", common(head_dim=16)),
    "qwen3-moe": ("Qwen3MoeConfig", common(head_dim=16, num_experts=4, **EXPERTS)),
    "gemma2": (
        "Gemma2Config",
        common(head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=3.0, final_logit_softcapping=8.0),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        common(head_dim=16, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    ),
    "phi3": ("Phi3Config", common()),
    "phi3-window": ("Phi3Config", common(sliding_window=WINDOW)),
    "phimoe": ("PhimoeConfig", common(sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": POSITIONS,
            "initializer_range": 0.25,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": 32,
            "init_std": 0.25,
        },
    ),
    "deepseek-v2": ("DeepseekV2Config", common(**LATENT)),
    "deepseek-v3": ("DeepseekV3Config", common(**LATENT)),
    "granite-4": (
        "GraniteMoeHybridConfig",
        common(
            layer_types=["full_attention", "full_attention"],
            shared_intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            attention_multiplier=0.3,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
        ),
    ),
    "falcon": (
        "FalconConfig",
        {**common(), "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    ),
    "bloom": (
        "BloomConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.25,
            "seq_length": POSITIONS,
        },
    ),
    "llama-4": (
        "Llama4TextConfig",
        common(
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        ),
    ),
    "gpt-oss": (
        "GptOssConfig",
        common(
            head_dim=16,
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
    ),
}


def write(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint of that architecture in `folder`, as transformers saves it."""
    import transformers

    kind, values = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**{**values, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as zeros and ones, which hide mistakes
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def dense(folder: Path) -> Any:
    """The same checkpoint as transformers runs it by itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="auto").eval()


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


class Rows:
    """Rows of tokens on pages of a model, in shuffled pages, fed step by step."""

    def __init__(self, model: PagedModel, rows: int, page_size: int = 16, longest: int = 200, **params: Any) -> None:
        self.model, self.page_size = model, page_size
        width = -(-longest // page_size)
        self.params = model.cache_params(page_size=page_size, devices=["cpu"], **params)
        buffers = PageBuffers(self.params, rows * width, ["cpu"])
        self.blocks = buffers.all_buffers[0]
        null = rows * width
        ids = torch.randperm(null, generator=torch.Generator().manual_seed(7)).int()
        self.table = torch.full((rows, width + 2), null, dtype=torch.int32)
        self.table[:, :width] = ids.view(rows, width)
        self.lengths = [0] * rows

    def inputs(self, rows: Sequence[int], longest: int) -> ShardInputs:
        scalar = torch.tensor([longest], dtype=torch.int32)
        lengths = torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32)
        return ShardInputs(self.blocks, None, self.table[list(rows)], lengths, scalar, scalar, scalar.long())

    def step(self, active: dict[int, Sequence[int]], **options: Any) -> torch.Tensor:
        """Process the next tokens of some rows: logits after the last of each."""
        rows, counts = list(active), [len(tokens) for tokens in active.values()]
        longest = max(self.lengths[row] + count for row, count in zip(rows, counts, strict=True))
        tokens = torch.tensor([token for part in active.values() for token in part])
        found = self.model.logits(self.inputs(rows, longest), tokens, counts, **options)
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        return found

    def share(self, source: int, target: int, tokens: int) -> None:
        """Give `target` the pages of the first tokens of `source`: what a prefix hit does."""
        assert tokens % self.page_size == 0
        self.table[target, : tokens // self.page_size] = self.table[source, : tokens // self.page_size]
        self.lengths[target] = tokens


def prefill(rows: Rows, texts: Sequence[Sequence[int]], chunk: int, decode: Callable[[torch.Tensor], int]) -> list[Any]:
    """Feed prompts in chunks, all rows in one batch; rows that are through decode on, so that batches are mixed.

    Returns per row the logits after its prompt, and the tokens that `decode` chose after it until all were through.
    """
    after: list[Any] = [None] * len(texts)
    answers: list[list[int]] = [[] for _ in texts]
    while any(found is None for found in after):
        active = {
            row: answers[row][-1:] if after[row] is not None else text[rows.lengths[row] : rows.lengths[row] + chunk]
            for row, text in enumerate(texts)
        }
        for row, logits in zip(active, rows.step(active), strict=True):
            if after[row] is None and rows.lengths[row] == len(texts[row]):
                after[row] = logits
            if after[row] is not None:
                answers[row].append(decode(logits))
    return list(zip(after, answers, strict=True))
