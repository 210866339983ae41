"""Answers of a given shape: always of it, the same after a loss and a preemption, and what is no shape is named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from rayk.cluster import Cluster
from rayk.errors import ConfigError
from rayk.request_errors import RequestError
from rayk.sampling import SamplingParams

from .conftest import Served

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SHAPES: list[dict[str, Any]] = [
    {"guided_json": SCHEMA},
    {"guided_regex": "[a-c]{3}-[0-9]{2,4}"},
    {"guided_choice": ["yes", "no", 'say "ü"']},
    {"guided_grammar": 'start: "<" /[a-z]{1,6}/ ">"'},
    {"structured_outputs": {"json_object": True}},
]


def fits(shape: dict[str, Any], text: str) -> bool:
    [(kind, given)] = shape.items()
    match kind:
        case "guided_json":
            jsonschema.validate(json.loads(text), given)
            return True
        case "guided_regex":
            return re.fullmatch(given, text) is not None
        case "guided_choice":
            return text in given
        case "guided_grammar":
            return re.fullmatch("<[a-z]{1,6}>", text) is not None
        case _:
            return isinstance(json.loads(text), dict)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder, replicas=2, page_size=16, pages=400) as cluster:
        yield cluster


@pytest.mark.parametrize("shape", SHAPES[:4], ids=[next(iter(shape)) for shape in SHAPES[:4]])
def test_answers_are_of_their_shape(cluster: Cluster, shape: dict[str, Any]) -> None:
    outputs = cluster.generate(["a", "b"], temperature=1.5, seed=3, n=4, max_tokens=400, **shape)
    for output in outputs:
        assert output.error is None and output.finish_reason == "stop"
        assert output.text is not None and fits(shape, output.text), output.text
    assert len({output.text for output in outputs}) > 1
    greedy = cluster.generate("a", max_tokens=400, min_tokens=300, **shape)[0]
    assert greedy.text is not None and fits(shape, greedy.text), "min_tokens gives way"


def test_the_same_answer_after_a_loss_and_a_preemption(folder: Path) -> None:
    """Pages for few of them, and a replica that goes away in the middle."""
    prompts = [[40 + i] * 20 for i in range(12)]
    sampling = [SamplingParams(temperature=1.2, seed=i, max_tokens=60, **SHAPES[i % 2]) for i in range(len(prompts))]
    with Cluster(folder, page_size=4, pages=400) as alone:
        undisturbed = alone.generate(prompts, sampling)
        want = [output.text for output in undisturbed]
    with Cluster(folder, replicas=2, page_size=4, pages=26, max_retries=2) as few:
        handles = few.submit_all(prompts, sampling)
        while not any(handle.tokens for handle in handles if handle.replica == 1):
            pass
        few.remove_replica(1)  # its requests go on at the other one
        found = [handle.result(60) for handle in handles]
        assert [output.error for output in found] == [None] * len(prompts)
        assert [output.text for output in found] == want
        assert few.stats(0).preemptions > 0
    ended = [i for i, output in enumerate(undisturbed) if output.finish_reason == "stop"]
    assert len(ended) >= 6 and all(fits(SHAPES[i % 2], str(want[i])) for i in ended)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"guided_json": {"type": "nothing"}}, "structured_outputs: "),
        ({"guided_json": "{"}, "structured_outputs: "),
        ({"guided_regex": "(a"}, "structured_outputs: "),
        ({"guided_grammar": "start: nowhere"}, "structured_outputs: "),
        ({"guided_choice": []}, "exactly one"),
        ({"structured_outputs": {"json_object": True, "regex": "a"}}, "exactly one"),
    ],
)
def test_what_is_no_shape(cluster: Cluster, shape: dict[str, Any], message: str) -> None:
    [output] = cluster.generate("a", max_tokens=4, **shape)
    assert isinstance(output.error, RequestError) and message in str(output.error)


def test_settings_that_say_it_twice() -> None:
    with pytest.raises(ConfigError, match="one setting"):
        SamplingParams(guided_regex="a", guided_choice=["a"])
    with pytest.raises(ConfigError, match="structured_outputs has one of"):
        SamplingParams(structured_outputs={"xml": "a"})


def test_response_formats(served: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Who are you?"}], "seed": 5}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = served.client.chat.completions.create(**asked, response_format=wanted, n=2)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    stream = served.client.chat.completions.create(**asked, response_format=wanted, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content
    choice = served.client.chat.completions.create(**asked, extra_body={"guided_choice": ["x", "y"]}).choices[0]
    assert choice.message.content in ("x", "y")
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"items": deep}
    for given, param in (
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": wanted, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": deep}, "guided_json"),
        ({"guided_regex": "(a"}, "structured_outputs"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            served.client.chat.completions.create(**asked, extra_body=given)
        assert refused.value.param == param
