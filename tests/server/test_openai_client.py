"""OpenAI's own client against the server: what it reads is what Cluster itself answers."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .conftest import KEY, Served

CHAT = [{"role": "user", "content": "Count from two to nine."}]


def test_models(served: Served) -> None:
    [model] = served.client.models.list().data
    assert model.id == "tiny" and served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("another")


def test_a_completion_is_the_clusters_answer(served: Served) -> None:
    prompts = ["The capital of", list(range(40, 80))]
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 4, "max_tokens": 12}
    mine = served.cluster.generate(prompts, n=2, logprobs=2, **settings)
    answer = served.client.completions.create(model="tiny", prompt=prompts, n=2, logprobs=2, **settings)
    assert [choice.text for choice in answer.choices] == [output.text for output in mine]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == sum(len(output.tokens) for output in mine)
    assert answer.usage.prompt_tokens == mine[0].prompt_length + mine[2].prompt_length
    for choice, output in zip(answer.choices, mine, strict=True):
        assert choice.finish_reason == output.finish_reason
        assert choice.logprobs.token_logprobs == pytest.approx([each.chosen for each in output.logprobs], abs=1e-4)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(output.tokens)
    parts: dict[int, str] = {}
    last = None
    more = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in served.client.completions.create(model="tiny", prompt=prompts, n=2, **settings, **more):
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + choice.text
        last = chunk.usage
    assert [parts[index] for index in range(4)] == [output.text for output in mine]
    assert last.completion_tokens == answer.usage.completion_tokens and last.prompt_tokens_details.cached_tokens > 0


def test_a_chat_is_the_clusters_answer(served: Served) -> None:
    [mine] = served.cluster.chat(CHAT, max_tokens=24, logprobs=3)
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_completion_tokens": 24}
    answer = served.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    [choice] = answer.choices
    assert choice.message.content == mine.text and choice.message.role == "assistant"
    want = [each.chosen for each in mine.logprobs]
    assert [each.logprob for each in choice.logprobs.content] == pytest.approx(want, abs=1e-4)
    assert all(len(each.top_logprobs) == 3 for each in choice.logprobs.content)
    stream = list(served.client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == mine.text
    assert stream[0].choices[0].delta.role == "assistant" and stream[-1].choices[0].finish_reason == mine.finish_reason
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert served.client.chat.completions.create(**asked | {"messages": parts}).choices[0].message == choice.message
    final = [*CHAT, {"role": "assistant", "content": "two, three"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    continued = served.client.chat.completions.create(**asked | {"messages": final}, extra_body=extra)
    variables = {"add_generation_prompt": False, "continue_final_message": True}
    [rest] = served.cluster.chat(final, max_tokens=24, template_variables=variables)
    assert continued.choices[0].message.content == rest.text and continued.choices[0].token_ids == rest.tokens


def test_200_random_requests_are_transformers_answers(served: Served, folder: Path) -> None:
    model, draw = AutoModelForCausalLM.from_pretrained(folder), random.Random(5)
    prompts = [[draw.randrange(3, 500) for _ in range(draw.randrange(1, 40))] for _ in range(200)]
    lengths = [draw.randrange(1, 8) for _ in prompts]
    with ThreadPoolExecutor(16) as threads:
        client = served.client
        answers = list(
            threads.map(
                lambda prompt, length: client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=length, temperature=0, extra_body={"return_token_ids": True}
                ),
                prompts,
                lengths,
            )
        )
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        want = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                              max_new_tokens=length, do_sample=False)[0, len(prompt):].tolist()  # fmt: skip
        assert answer.choices[0].token_ids == want


def test_an_echo_has_the_log_probabilities_of_the_prompt(served: Served, folder: Path) -> None:
    """What lm-eval asks for: no new token, and each of the prompt's scored as the dense model scores it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = "The capital of Peru is Lima."
    ids = tokenizer(text)["input_ids"]
    with torch.inference_mode():
        dense = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = [float(dense[at, token]) for at, token in enumerate(ids[1:])]
    for tokens in (0, 1):
        answer = served.client.completions.create(
            model="tiny", prompt=[ids, text], echo=True, logprobs=1, max_tokens=tokens
        )
        for choice in answer.choices:
            found = choice.logprobs
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
            assert found.token_logprobs[1 : len(ids)] == pytest.approx(want, abs=1e-4)
            assert len(found.tokens) == len(ids) + tokens and choice.text.startswith(text)
            assert "".join(found.tokens[: len(ids)]) == text
            for at, top in enumerate(found.top_logprobs[1 : len(ids)], 1):
                assert max(top.values()) == pytest.approx(float(dense[at - 1].max()), abs=1e-4)
        assert answer.usage.prompt_tokens == 2 * len(ids)


def test_tokens_and_texts(served: Served, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    status, found = served.ask("/tokenize", {"prompt": "Hello there", "return_token_strs": True})
    assert status == 200 and found["tokens"] == tokenizer("Hello there")["input_ids"]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert served.ask("/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": "Hello there"})
    status, chat = served.ask("/tokenize", {"messages": CHAT})
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert chat["tokens"] == tokenizer(text)["input_ids"]


def test_a_client_that_goes_away_ends_its_requests(served: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    stream = served.client.completions.create(**asked, n=3, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: all(served.cluster.stats(replica).running == 0 for replica in (0, 1)))
    with pytest.raises(openai.APITimeoutError):
        served.client.completions.create(**asked, timeout=0.2)

    async def cancelled() -> None:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key=KEY, max_retries=0)
        task = asyncio.create_task(client.completions.create(**asked))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()

    asyncio.run(cancelled())
    until(lambda: all(served.cluster.stats(replica).running == 0 for replica in (0, 1)))


def test_one_slow_reader_holds_up_nobody(served: Served) -> None:
    long = {"prompt": "a", "max_tokens": 700, "stream": True, "ignore_eos": True, "n": 8, "temperature": 1.0}
    slow = served.send("POST", "/v1/completions", long)
    assert slow.read(10)  # and no more
    for _ in range(3):
        assert served.client.completions.create(model="tiny", prompt="b", max_tokens=4).choices[0].text is not None
    until(lambda: all(served.cluster.stats(replica).running == 0 for replica in (0, 1)))
    assert slow.read().endswith(b"data: [DONE]\n\n")
