"""What load_model() makes of a folder, and what it says about one that it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayk import Cluster, RaykError
from rayk.attention.pool import PagedPool
from rayk.errors import ArchitectureError, AttentionError, BatchError, CheckpointError, ConfigError
from rayk.models import load_model
from rayk.models.checkpoint import identity

from .checkpoints import VOCAB, Rows, common, dense, prompts, write


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


def test_what_an_engine_reads(llama: Path) -> None:
    model = load_model(str(llama))
    assert (model.vocab_size, model.max_length, model.eos_token_ids) == (VOCAB, 1024, (2,))
    assert model.tokenizer is None and model.backend == "torch-sdpa" and model.architecture == "LlamaForCausalLM"
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    stored = sum(t.nbytes for t in load_file(llama / "model.safetensors").values())
    assert stored <= model.num_bytes < 1.1 * stored + 1000


class Wrapped(torch.Tensor):
    """A weight without bytes of its own around the tensor that has them, as quantised weights of torchao are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        bare = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        return func(*bare, **(kwargs or {}))


def test_weights_that_wrap_others_are_counted_and_served(llama: Path) -> None:
    model = load_model(llama)
    before = model.num_bytes
    with Cluster(lambda device: model, page_size=4, pages=16) as cluster:
        want = cluster.generate([[5, 6, 7]], max_new_tokens=3)[0].tokens
    projection = model._model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(Wrapped(projection.weight.detach()), requires_grad=False)
    assert model.num_bytes == before
    with Cluster(lambda device: model, page_size=4, pages=16) as cluster:
        assert cluster.generate([[5, 6, 7]], max_new_tokens=3)[0].tokens == want


def test_cache_params(llama: Path) -> None:
    model = load_model(llama)
    params = model.cache_params(
        page_size=16, devices=["cpu", "cpu"], data_parallel_degree=2, enable_prefix_caching=True
    )
    assert (params.num_layers, params.n_kv_heads, params.head_dim, params.dtype) == (2, 2, 8, "float32")
    assert (params.page_size, params.data_parallel_degree, params.tensor_parallel_degree) == (16, 2, 1)
    assert params.enable_prefix_caching
    assert model.cache_params(devices=["cpu"] * 3).data_parallel_degree == 3
    assert model.cache_params().page_size == 128
    with pytest.raises(ConfigError, match=r"4 device\(s\) for 2 replica\(s\).*splits it over several"):
        model.cache_params(devices=["cpu"] * 4, data_parallel_degree=2)
    with pytest.raises(ConfigError, match="dtype 'float12'"):
        model.cache_params(dtype="float12")
    with pytest.raises(AttentionError, match=r"torch-sdpa: .*not torch.int8"):
        model.cache_params(dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(llama: Path, dtype: str) -> None:
    model = load_model(llama, dtype=dtype)
    assert model.cache_params().dtype == dtype
    logits = Rows(model, 1).step({0: [5, 6, 7]})
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_the_checkpoints_dtype_is_kept(tmp_path: Path, llama: Path) -> None:
    load_model(llama, dtype="bfloat16")._model.save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_float8_pages_cost_little(llama: Path) -> None:
    model, (text,) = load_model(llama), prompts([60])
    want = Rows(model, 1).step({0: text})
    rows = Rows(model, 1, dtype="float8_e4m3fn")
    assert rows.blocks.dtype == torch.float8_e4m3fn
    rows.step({0: text[:40]})
    got = rows.step({0: text[40:]})
    assert 0 < (got - want).norm() / want.norm() < 0.25


def test_a_tokenizer_where_there_is_one(copy: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "</s>": 2, "hello": 5, "world": 6}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(copy / "tokenizer.json"))
    edit_or_make = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(edit_or_make))
    model = load_model(copy)
    assert model.tokenizer("hello world")["input_ids"] == [5, 6]
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"copy: tokenizer.json: no tokenizer can be made of it"):
        load_model(copy)


def test_sharded_weights(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama)
    model._model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_model(tmp_path)
    (text,) = prompts([30])
    assert torch.equal(Rows(again, 1).step({0: text}), Rows(model, 1).step({0: text}))
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"{victim.name}: is missing; model.safetensors.index.json has"):
        load_model(tmp_path)


def test_eos_of_the_generation_config_comes_first(copy: Path) -> None:
    edit(copy, "generation_config.json", eos_token_id=[7, 9])
    assert load_model(copy).eos_token_ids == (7, 9)
    (copy / "generation_config.json").unlink()
    edit(copy, eos_token_id=None)
    assert load_model(copy).eos_token_ids == ()


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "config is no object": (lambda f: (f / "config.json").write_text("[]"), "config.json: is not a JSON object"),
    "config is refused": (
        lambda f: edit(f, num_hidden_layers="two"),
        "config.json: is refused by transformers: .*num_hid",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: is missing, and so is"),
    "weights cut off": (truncate, "model.safetensors: is damaged"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: is damaged"),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("x" * 99), "model.safetensors: is damaged"),
    "a tensor is missing": (drop_a_tensor, r"1 tensor\(s\) are missing, such as model.layers.1.mlp.up_proj.weight"),
    "another shape": (
        lambda f: edit(f, intermediate_size=64),
        r"layers.0.mlp.\w+.weight has shape .*48.*, config.json wants .*64",
    ),
    "pickle": (only_a_pickle, "pytorch_model.bin: weights in a pickle are not loaded.*convert"),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json: has no weight_map",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(copy: Path, damage: str) -> None:
    spoil, says = DAMAGE[damage]
    spoil(copy)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_model(copy)
    assert isinstance(caught.value, RaykError) and isinstance(caught.value, ValueError)
    assert caught.value.folder == str(copy) and str(copy) in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: does not exist; nothing is downloaded"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="gpt2: does not exist"):
        load_model("gpt2")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        load_model(tmp_path / "file")


def of_type(folder: Path, kind: str, **values: Any) -> Path:
    """A random checkpoint of any of transformers' classes."""
    import transformers

    config = getattr(transformers, kind)(**values)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "MambaConfig": (SMALL, "MambaForCausalLM cannot run on rayk's pages: it keeps a recurrent state"),
    "JambaConfig": (common(), "JambaForCausalLM .*recurrent state"),
    "OpenAIGPTConfig": (
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "OpenAIGPTLMHeadModel .*registry; and attending by itself over pages, it caches nothing",
    ),
    "Lfm2Config": (common(layer_types=["conv", "full_attention"]), "Lfm2ForCausalLM"),
    "BertConfig": (
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "BertLMHeadModel .*not causal",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_on_pages_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    values, says = REFUSED[kind]
    of_type(tmp_path, kind, **values)
    with pytest.raises(ArchitectureError, match=says):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "unheard_of", "architectures": ["UnheardOf"]}, "UnheardOf .*'unheard_of' is unknown"),
        ({"model_type": "t5"}, "'t5' is no causal"),
        ({"is_causal": False}, "not causal"),
        ({"use_bidirectional_attention": True}, "looks ahead"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention; known are"),
    ],
)
def test_what_the_config_says(copy: Path, changes: dict[str, Any], says: str) -> None:
    edit(copy, **changes)
    with pytest.raises(ArchitectureError, match=says):
        load_model(copy)


def test_a_model_that_pages_change_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("write", "write_slots"):
        monkeypatch.setattr(PagedPool, way, lambda *arguments: None)
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM .*differ from those without a cache by"):
        load_model(llama)


def test_a_model_that_the_registry_changes_attends_by_itself(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PagedPool, "write", lambda *arguments: None)
    assert load_model(llama).backend == "transformers"
    assert (
        "LlamaForCausalLM attends by itself, over keys and values that are gathered for it: its logits" in caplog.text
    )
    with pytest.raises(AttentionError, match="attends by itself; leave attention='torch-sdpa' out"):
        load_model(llama, attention="torch-sdpa")


def test_a_window_that_is_not_seen_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows are far longer than the trial."""
    write(tmp_path, "gemma2", sliding_window=200)
    monkeypatch.setattr("rayk.models.bridge.window_of", lambda module, given: None)
    assert load_model(tmp_path).backend == "transformers"
    monkeypatch.undo()
    model = load_model(tmp_path)
    assert model.backend == "torch-sdpa" and model._model.config.sliding_window == 200
    windows = {getattr(module, "sliding_window", None) for module in model._model.modules()}
    assert windows == {None, 200}


def test_code_in_a_checkpoint_is_not_run(copy: Path) -> None:
    (copy / "modeling.py").write_text("raise SystemExit('ran')\n")
    edit(copy, model_type="own", auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(ArchitectureError, match="'own' is unknown to transformers"):
        load_model(copy)


def test_arguments(llama: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of auto, float32"):
        load_model(llama, dtype="int8")
    with pytest.raises(AttentionError, match="'fast' is unknown"):
        load_model(llama, attention="fast")
    with pytest.raises(AttentionError, match="vllm-flash-attn-3: it needs a CUDA device"):
        load_model(llama, attention="vllm-flash-attn-3")
    assert load_model(llama, attention="torch-sdpa").backend == "torch-sdpa"
    with pytest.raises(ConfigError, match="device 'gpu'"):
        load_model(llama, device="gpu")
    with pytest.raises(ConfigError, match=r"device 'cuda:99': this process sees \d+ CUDA device"):
        load_model(llama, device="cuda:99")


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
}


@pytest.mark.parametrize(
    ("name", "rope", "more", "length"),
    [
        ("phi3", LONGROPE, {"original_max_position_embeddings": 64}, 64),
        ("llama", {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}, {}, 1024),
        ("llama", {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}, {}, 1024),
    ],
)
def test_frequencies_do_not_depend_on_the_batch(
    tmp_path: Path, name: str, rope: dict[str, Any], more: dict[str, Any], length: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that would are kept as they are for short rows, and longer rows are refused."""
    write(tmp_path, name, rope_parameters=rope, **more)
    model = load_model(tmp_path)
    assert model.max_length == length
    assert (f"up to {length} of its 1024 positions" in caplog.text) == (length < 1024)
    (text,) = prompts([length])
    rows = Rows(model, 2, longest=1200)
    alone = rows.step({0: text})
    with torch.inference_mode():
        want = dense(tmp_path)(torch.tensor([text])).logits[0, -1]
    torch.testing.assert_close(alone[0], want, rtol=1e-5, atol=1e-4)
    with pytest.raises(BatchError, match=rf"a row of {length + 1} tokens, and .* has {length} positions"):
        rows.step({0: [5]})


def test_batches_that_do_not_fit(llama: Path) -> None:
    model = load_model(llama)
    rows = Rows(model, 2)
    inputs = rows.inputs([0, 1], 10)
    tokens = torch.arange(5)
    with pytest.raises(BatchError, match=r"2 row\(s\), 1 count"):
        model.logits(inputs, tokens, [5])
    with pytest.raises(BatchError, match=r"\(5,\) tokens for counts \[4, 4\], which want 8"):
        model.logits(inputs, tokens, [4, 4])
    for token in (-1, VOCAB):
        with pytest.raises(BatchError, match=rf"token {token} is outside the vocabulary of {VOCAB}"):
            model.logits(inputs, torch.tensor([3, token]), [1, 1])
    with pytest.raises(BatchError, match="at least one token"):
        model.logits(inputs, tokens, [5, 0])
    other = Rows(load_model(write(llama.parent / "other", "qwen3")), 2)
    with pytest.raises(BatchError, match=r"pages of \(2, 2, 16\).*needs \(2, 2, 8\)"):
        model.logits(other.inputs([0, 1], 10), tokens, [4, 1])


def test_models_and_threads_share_a_process(llama: Path, tmp_path: Path) -> None:
    models = [load_model(llama), load_model(write(tmp_path, "gemma2"))]
    texts = prompts([50, 30])
    want = [[Rows(model, 1).step({0: text}) for text in texts] for model in models]
    wrong: list[int] = []

    def work(at: int) -> None:
        for _ in range(5):
            for text, expected in zip(texts, want[at % 2], strict=True):
                if not torch.allclose(Rows(models[at % 2], 1).step({0: text}), expected, atol=1e-6):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_checkpoint_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / name, "llama", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert identity(one) == identity(same) != identity(other)
    config = other / "config.json"
    before = identity(other)
    config.write_text(config.read_text().replace("10000", "20000", 1))
    assert identity(other) != before
