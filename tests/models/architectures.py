"""Every causal architecture of the installed transformers, made small, saved, loaded by load_model and served.

    python -m tests.models.architectures                        # a few minutes on one core
    python -m tests.models.architectures --write docs/architectures.md
    python -m tests.models.architectures BloomConfig LlavaConfig --verbose

Each gets random weights, is saved as transformers saves it, and served by a Cluster of two replicas: prompts in chunks,
some with a common beginning, on few pages. Every answer is compared with model.generate(), token by token; where they
differ the dense model's two best logits must be within 1e-4. Exit code 1 where one differs elsewhere ("wrong").
Multimodal checkpoints follow, served for their text alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ..greedy.matrix import Reference, compare, dense_answers  # noqa: TID252  # tests/ is no package of its own

VOCAB, POSITIONS, WINDOW = 128, 256, 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "sliding_window": WINDOW,
    "rotary_dim": 8,
    "embedding_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
    "init_std": 0.25,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "num_heads": 4,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "vision_output_dim": 32,
    "projection_dim": 32,
    "mlp_dim": 32,
    "is_decoder": True,
}
"""By field name, where a config has that field."""

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
ALIKE = {"num_key_value_heads": 4, "num_attention_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "AXK1Config": ALIKE,
    "AXK2Config": ALIKE,
    "BambaConfig": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "BloomConfig": {"seq_length": POSITIONS},
    "CohereCompassTextConfig": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention",)},
        "layer_types": ["full_attention", "full_attention"],
    },
    "CpmAntConfig": {"dim_head": 8, "dim_ff": 48},
    "CTRLConfig": {"dff": 48},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "DeepseekV2Config": ALIKE,
    "DeepseekV3Config": ALIKE,
    "DeepseekV32Config": ALIKE,
    "Dots1Config": {"n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_routed_experts": 4},
    "Dots3NoteTextConfig": ALIKE,
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "num_layers": 2},
    "Gemma3nTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 8,
        "intermediate_size": [48] * 4,
    },
    "Gemma4TextConfig": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {"1": {"head_dim": 16}},
    },
    "Gemma4UnifiedTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {"1": {"head_dim": 16}},
    },
    "Glm4MoeLiteConfig": ALIKE,
    "Glm4vMoeTextConfig": {
        "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    },
    "Glm4vTextConfig": MROPE,
    "GlmOcrTextConfig": MROPE,
    "GlmMoeDsaConfig": ALIKE,
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 1},
    "LongcatFlashConfig": {
        **ALIKE,
        "num_layers": 2,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "head_dim": 8,
        "qk_head_dim": 24,
    },
    "Mamba2Config": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "MiniCPM3Config": ALIKE,
    "MinistralConfig": {"head_dim": 8},
    "ModernBertDecoderConfig": {"local_attention": 2 * WINDOW},
    "Mistral4Config": ALIKE,
    "MoshiConfig": {"audio_vocab_size": VOCAB},
    "MptConfig": {"max_seq_len": POSITIONS},
    "OlmoHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "PaddleOCRTextConfig": MROPE,
    "Qwen2VLTextConfig": MROPE,
    "Qwen2_5OmniTextConfig": MROPE,
    "Qwen2_5_VLTextConfig": MROPE,
    "Qwen4ExpTextConfig": {"head_dim": 8},
    "ReformerConfig": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16], "hidden_size": 32},
    "RoCBertConfig": {
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCAB,
        "pronunciation_vocab_size": VOCAB,
    },
    "XmodConfig": {"languages": ["en_XX"], "default_language": "en_XX"},
    "YoutuConfig": ALIKE,
    "ZambaConfig": {"layer_types": ["mamba", "hybrid"], "num_hidden_layers": 2},
    "Zamba2Config": {"layer_types": ["mamba", "hybrid"], "num_hidden_layers": 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
"""By config class: what its own fields have to be beyond that."""

LARGEST = 100_000_000  # parameters
NEW_TOKENS = 16
MEANING = """"equal": every token is that of generate(); "forward": of forward(), which generate() differs from; "not
made": no small model could be made, or transformers itself does not generate from it."""
VERDICTS = ("equal", "wrong", "forward", "refused", "not made")


def tiny(config_class: Any) -> Any:
    """A small config of that class; whatever the class raises where that is not one."""
    fields = config_class().to_dict()
    attributes = config_class.attribute_map or {}
    names = {**{n: n for n in SIZES}, **{n: own for n, own in attributes.items() if n in SIZES}}
    parts = {
        name: kind
        for name, kind in (config_class.sub_configs or {}).items()
        if _is_config(kind) or (isinstance(fields.get(name), dict) and fields[name].get("model_type"))
    }
    changes: dict[str, Any] = {own: SIZES[n] for n, own in names.items() if own in fields and own not in parts}
    if isinstance(fields.get("head_dim"), int):
        changes["head_dim"] = 8
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and kinds:
        changes["layer_types"] = [kinds[0], next((kind for kind in kinds if kind != kinds[0]), kinds[0])]
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    if isinstance(rope, dict) and "mrope_section" in rope:
        changes["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
        changes["head_dim"] = 8
    if fields.get("sliding_window") is None:
        changes.pop("sliding_window", None)
    changes |= {name: _part(fields.get(name), kind) for name, kind in parts.items()}
    changes |= OWN.get(config_class.__name__, {})
    return config_class(**changes)


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, transformers.PreTrainedConfig)


def _part(default: Any, kind: Any) -> dict[str, Any]:
    """A part of a composite config, as a dictionary: of the class that the default says."""
    if isinstance(default, dict) and default.get("model_type") in transformers.CONFIG_MAPPING:
        kind = transformers.CONFIG_MAPPING[default["model_type"]]
    found: dict[str, Any] = tiny(kind).to_dict()
    return found


def causal() -> list[tuple[Any, Any]]:
    """Config and model class of every causal language model, by name."""
    mapping = AutoModelForCausalLM._model_mapping
    whole = AutoModelForImageTextToText._model_mapping
    pairs = {config: mapping[config] for config in mapping.keys()}  # noqa: SIM118  # no mapping: it has keys() alone
    for config, model in pairs.items():
        if model.config_class is not config and config in whole:  # the class of its text alone
            pairs[config] = whole[config]
    return sorted(pairs.items(), key=lambda pair: pair[0].__name__)


def multimodal() -> list[tuple[Any, Any]]:
    """Those of models with images that are no causal language model by another name."""
    mapping, known = AutoModelForImageTextToText._model_mapping, {config for config, _ in causal()}
    pairs = {config: mapping[config] for config in mapping.keys() if config not in known}  # noqa: SIM118  # as above
    return sorted(pairs.items(), key=lambda pair: pair[0].__name__)


def save(config_class: Any, model_class: Any, folder: Path, seed: int = 0) -> Path:
    """A random checkpoint of that class, small; whatever the classes raise where none can be made."""
    config = tiny(config_class)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters: not small")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start as zeros and ones, which hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif float(parameter.std()) < 0.1:
                parameter.normal_(std=0.25)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.save_pretrained(folder)
    return folder


class Tried(NamedTuple):
    """verdict: "equal", "wrong", "forward", "refused" or "not made". why: of the last two; by: what attends."""

    config: str
    model: str
    verdict: str
    by: str = ""
    why: str = ""
    ties: int = 0


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        found: list[int] = torch.randint(3, VOCAB - 8, (count,), generator=generator).tolist()
        return found

    head = draw(32)
    return [[*head, *draw(9)], draw(5), [*head, *draw(30)], draw(71), [*head, *draw(1)], draw(1)]


def attempt(config_class: Any, model_class: Any, folder: Path) -> Tried:
    """Make it, load it and serve it."""
    from rayk import Cluster, RaykError

    names, texts = (config_class.__name__, model_class.__name__), prompts()
    try:
        save(config_class, model_class, folder)
    except Exception as error:  # no tiny model can be made of it in this simple way
        return Tried(*names, "not made", why=_line(error))
    try:
        with Cluster(folder, replicas=2, page_size=16, pages=24, chunk_size=24, max_batch_size=4, device="cpu") as c:
            outputs = c.generate(texts, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            by = c.facts[0].backend
            c.check_integrity()
    except RaykError as error:
        return Tried(*names, "refused", why=_line(error).replace(str(folder), "folder"))
    except Exception as error:  # what it is refused for has to be said
        return Tried(*names, "wrong", why=f"raised {_line(error)}")
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        return Tried(*names, "wrong", by, _line(failed[0]))
    try:
        dense = model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        references = dense_answers(dense, texts, NEW_TOKENS)
    except Exception as error:  # transformers itself does not generate from it
        return Tried(*names, "not made", why=_line(error))
    kinds = [compare(output.tokens, each) for output, each in zip(outputs, references, strict=True)]
    if "wrong" not in kinds:
        return Tried(*names, "equal", by, "", kinds.count("tie"))
    forward = [compare(each.tokens, plain_answer(dense, text)) for each, text in zip(outputs, texts, strict=True)]
    if "wrong" not in forward:
        return Tried(*names, "forward", by, "generate() counts its positions otherwise", forward.count("tie"))
    return Tried(*names, "wrong", by, f"{kinds.count('wrong')} of {len(kinds)} answers differ")


@torch.inference_mode()
def plain_answer(model: Any, prompt: list[int]) -> Reference:
    """Greedy tokens by one forward over everything for each, without a cache."""
    tokens, gaps = torch.tensor([prompt]), []
    for _ in range(NEW_TOKENS):
        last = model(input_ids=tokens, use_cache=False).logits[:, -1]
        first, second = last[0].topk(2).values.tolist()
        gaps.append(first - second)
        tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], dim=1)
    return Reference(tokens[0, len(prompt) :].tolist(), gaps)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return f"{type(error).__name__}: {text}" if not type(error).__module__.startswith("rayk") else text


def survey(pairs: list[tuple[Any, Any]], verbose: bool = False) -> Iterator[Tried]:
    for config_class, model_class in pairs:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            found = attempt(config_class, model_class, Path(folder))
            if verbose:
                print(*found, f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
            yield found


def table(title: str, tried: list[Tried]) -> str:
    counts = Counter(each.verdict for each in tried)
    total = ", ".join(f"{counts[kind]} {kind}" for kind in VERDICTS)
    lines = [f"## {title}", "", f"{len(tried)} tried: {total}. Ties: {sum(each.ties for each in tried)}.", ""]
    lines += ["| config | model | verdict | attends | why |", "|---|---|---|---|---|"]
    lines += [
        f"| {each.config} | {each.model} | {each.verdict} | {each.by} | {each.why.replace('|', '/')[:220]} |"
        for each in tried
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="names of config classes; all unless given")
    parser.add_argument("--only", choices=("causal", "multimodal"))
    parser.add_argument("--write", type=Path, help="a file for the tables")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("rayk").setLevel(logging.ERROR)
    parts, bad = [], 0
    for title, pairs in (
        ("Causal language models", causal() if args.only != "multimodal" else []),
        ("Text of multimodal models", multimodal() if args.only != "causal" else []),
    ):
        chosen = [pair for pair in pairs if not args.configs or pair[0].__name__ in args.configs]
        tried = list(survey(chosen, args.verbose))
        bad += sum(each.verdict == "wrong" for each in tried)
        if tried:
            parts.append(table(title, tried))
            print(parts[-1], flush=True)
    if args.write:
        head = f"# Architectures\n\nMade by `python -m tests.models.architectures --write {args.write}`, with"
        args.write.write_text("\n".join([f"{head} transformers {transformers.__version__}. {MEANING}\n", *parts]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
