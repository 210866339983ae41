"""A Hugging Face model on pages: what an engine needs of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rayk.attention import Backend, PagedPool, choose, pack
from rayk.errors import AttentionError, BatchError, ConfigError
from rayk.kvcache.runtime_inputs import ShardInputs
from rayk.models.architecture import needs
from rayk.models.bridge import ByRegistry, Way
from rayk.params import MHAKVCacheParams, MLAKVCacheParams, dtype_name

PAGE_SIZE = 128


class PagedModel:
    """One model on one device; made by load_model(). Several may live in one process, and in several threads.

    vocab_size: width of the logits. max_length: positions that the model has, prompt and answer together.
    eos_token_ids: tokens that end an answer. tokenizer: transformers' own, or None. backend: name of what attends.
    """

    def __init__(
        self,
        model: Any,
        way: Way,
        vocab_size: int,
        max_length: int,
        eos_token_ids: tuple[int, ...],
        tokenizer: Any,
        attention: str | None,
    ) -> None:
        self._model = model
        self._way = way
        self._shapes = list(way.shapes.values())
        self._kv_heads = max(shape.kv_heads for shape in self._shapes)
        self._head_dim = max(shape.head_dim for shape in self._shapes)
        self._latent = self._shapes[0].latent
        self._query_heads: int = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", 1)
        self._attention = attention
        self._backends: dict[tuple[torch.dtype, int], Backend] = {}
        self.vocab_size = vocab_size
        self._embedded: int = model.get_input_embeddings().weight.shape[0]
        self.max_length = max_length
        self.eos_token_ids = eos_token_ids
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.backend: str = self._name(self.dtype, PAGE_SIZE)

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return type(self._model).__name__

    @property
    def num_bytes(self) -> int:
        """Bytes of its parameters and buffers on the device; what is shared counts once."""
        tensors = (part for t in (*self._model.parameters(), *self._model.buffers()) for part in _stored(t))
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def _name(self, cache_dtype: torch.dtype, page_size: int) -> str:
        backend = self._backend(cache_dtype, page_size)
        return "transformers" if backend is None else backend.name

    def _backend(self, cache_dtype: torch.dtype, page_size: int) -> Backend | None:
        """What attends over such pages; None where the model does so itself."""
        if not isinstance(self._way, ByRegistry):
            if self._attention is not None:
                raise AttentionError(f"{self.architecture} attends by itself; leave attention={self._attention!r} out")
            return None
        key = cache_dtype, page_size
        if key not in self._backends:
            asked = needs(self._way.shapes, self.device, self.dtype, cache_dtype, page_size)
            self._backends[key] = choose(asked, self._attention)
        return self._backends[key]

    def cache_params(
        self,
        page_size: int = PAGE_SIZE,
        devices: Sequence[str] | None = None,
        data_parallel_degree: int | None = None,
        dtype: str | None = None,
        **more: Any,
    ) -> MHAKVCacheParams | MLAKVCacheParams:
        """The cache of this model: one replica per device. `more` goes to MHAKVCacheParams, or to
        MLAKVCacheParams for a model of latents, as it is.

        dtype: of the pages, the model's own unless given ("float8_e4m3fn" where the backend reads it). From here on
        `backend` is what attends over such pages. ConfigError for more than one device a replica; AttentionError where
        no backend reads such pages.
        """
        devices = [str(self.device)] if devices is None else list(devices)
        replicas = len(devices) if data_parallel_degree is None else data_parallel_degree
        if len(devices) != replicas:
            raise ConfigError(
                f"{len(devices)} device(s) for {replicas} replica(s): a Hugging Face model runs on one device a "
                "replica in a process; Cluster(tp=..) splits it over several"
            )
        if more.get("kvcache_quant_config") is not None:
            raise ConfigError("pages with scales are not read by rayk's attention; use dtype='float8_e4m3fn' alone")
        name = dtype_name(dtype or self.dtype)
        self.backend = self._name(getattr(torch, name), page_size)
        shared: dict[str, Any] = {
            "dtype": name,
            "head_dim": self._head_dim,
            "num_layers": len(self._shapes),
            "page_size": page_size,
            "devices": devices,
            "data_parallel_degree": replicas,
            **more,
        }
        if self._latent:
            return MLAKVCacheParams(num_q_heads=self._query_heads, **shared)
        return MHAKVCacheParams(n_kv_heads=self._kv_heads, **shared)

    @torch.inference_mode()
    def logits(
        self, inputs: ShardInputs, tokens: torch.Tensor, counts: Sequence[int], *, every_token: bool = False
    ) -> torch.Tensor:
        """Process packed tokens: write their keys and values, and return float32 logits `[rows, vocab]`.

        inputs: the pages and tables of this batch. tokens: int64 `[sum(counts)]`; row i's are the counts[i] after its
        `inputs.cache_lengths[i]` cached ones, and its logits are those after its last. every_token: `[tokens, vocab]`
        instead. On CUDA the call does not wait for the device, and a batch of one token a row can be captured.
        BatchError for tokens, counts or lengths that do not fit each other, the table or the model.
        """
        pool = self._pool(inputs)
        try:
            batch = pack(
                inputs.lookup_table, inputs.cache_lengths, counts, pool.page_size, int(inputs.max_cache_length)
            )
        except AttentionError as error:
            raise BatchError(error.message) from None
        if tokens.shape != (batch.tokens,):
            raise BatchError(f"{tuple(tokens.shape)} tokens for counts {list(batch.counts)}, which want {batch.tokens}")
        if batch.kv_lengths_host is not None and batch.max_kv > self.max_length:
            raise BatchError(f"a row of {batch.max_kv} tokens, and {self.architecture} has {self.max_length} positions")
        self._check_tokens(tokens)
        backend = self._backend(pool.dtype, pool.page_size)
        return self._way.logits(pool, batch, backend, tokens.to(self.device, non_blocking=True), every_token).float()

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        """On the host only: on a device it would wait, and a wrong id ends the process there."""
        if tokens.device.type == "cpu":
            low, high = tokens.aminmax()
            if low < 0 or high >= self._embedded:
                wrong = int(low) if low < 0 else int(high)
                raise BatchError(f"token {wrong} is outside the vocabulary of {self._embedded} of {self.architecture}")

    def _pool(self, inputs: ShardInputs) -> PagedPool:
        if inputs.kv_blocks is None or inputs.kv_blocks.device != self.device:
            where = "not in this process" if inputs.kv_blocks is None else f"on {inputs.kv_blocks.device}"
            raise BatchError(f"the pages are {where}, {self.architecture} is on {self.device}")
        if inputs.kv_scales is not None:
            raise BatchError("pages with scales are not read by rayk's attention")
        pool = PagedPool(inputs.kv_blocks)
        want = (len(self._shapes), self._kv_heads, self._head_dim)
        if (pool.layers, pool.heads, pool.head_dim) != want or pool.kv_dim != (1 if self._latent else 2):
            raise BatchError(
                f"pages of {(pool.layers, pool.heads, pool.head_dim)} (layers, KV heads, head size), "
                f"{self.architecture} needs {want}; make the cache with its cache_params()"
            )
        return pool


def _stored(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold its bytes: itself, or the parts of one that wraps others (quantised weights, torchao's)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            if isinstance(part := getattr(tensor, name), torch.Tensor):
                yield from _stored(part)
    else:
        yield tensor
