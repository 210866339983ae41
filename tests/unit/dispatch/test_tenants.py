"""Tenants that are kept apart: what one has cached is neither counted nor reused for another, whatever its salt is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.kvcache.page_hash import tenant_salt

from ..engine.fake import PageModel, Tokenizer, expected  # noqa: TID252  # tests/ is no package

PROMPT = list(range(21))  # five pages and a token


def opened(**more: Any) -> Cluster:
    return Cluster(lambda device: PageModel(tokenizer=Tokenizer()), page_size=4, pages=64, max_batch_size=4, **more)


@pytest.fixture
def isolated() -> Iterator[Cluster]:
    with opened(replicas=2, isolate_tenants=True) as cluster:
        yield cluster


def cached(cluster: Cluster, **fields: Any) -> int:
    """Tokens that were not computed for that prompt; the answer is right."""
    [output] = cluster.generate([{"tokens": PROMPT, **fields}], max_new_tokens=2)
    assert output.tokens == expected(PROMPT, 2)
    return output.cached_tokens


def test_each_has_its_own(isolated: Cluster) -> None:
    for tenant in ("a", "b", None, ""):
        assert cached(isolated, tenant=tenant) == 0, "another's is not seen"
        assert cached(isolated, tenant=tenant) == 20
        assert cached(isolated, tenant=tenant, cache_salt="s") == 0
        assert cached(isolated, tenant=tenant, cache_salt="s") == 20


def test_no_salt_of_ones_own_is_anothers_root(isolated: Cluster) -> None:
    """Not even by whoever knows how roots are made, without the key."""
    assert cached(isolated, tenant="a") == 0
    key = isolated._replicas.settings.tenant_key
    assert key is not None
    for salt in ("a", "+1:a-", tenant_salt(bytes(32), "a", None), tenant_salt(key, "a", None)):
        assert cached(isolated, tenant="b", cache_salt=salt) == 0


def test_they_do_no_more_work_for_it_than_for_a_prompt_that_nobody_had(isolated: Cluster) -> None:
    """Time tells nothing, since what is computed is the same."""

    def computed() -> int:
        return sum(isolated.stats(r).cache.input_tokens for r in range(2))

    cached(isolated, tenant="a")
    once = computed()
    cached(isolated, tenant="b")
    assert computed() == 2 * once > len(PROMPT)


def test_by_default_they_share() -> None:
    with opened() as cluster:
        assert cached(cluster, tenant="a") == 0 and cached(cluster, tenant="b") == 20
        assert cluster._replicas.settings.tenant_key is None


def test_answers_to_one_prompt_share_it_still(isolated: Cluster) -> None:
    outputs = isolated.generate([{"tokens": PROMPT, "tenant": "a"}], n=2, max_new_tokens=2)
    assert sum(output.cached_tokens for output in outputs) >= 20


def test_roots_are_told_apart_whatever_the_names_are() -> None:
    names = [None, "", "a", "-", "+1:a", "a+0:"]
    salts = {tenant_salt(bytes(32), tenant, salt) for tenant in names for salt in names}
    assert len(salts) == len(names) ** 2
    assert tenant_salt(b"\1" * 32, "a", None) not in salts
