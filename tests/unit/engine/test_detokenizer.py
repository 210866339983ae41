"""Text from tokens one by one, with a real byte-level tokenizer made here."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rayk.engine.detokenizer import Detokenizer

TEXT = "The naïve café — 東京の天気は🌧️ and 👩‍👩‍👧 said: “stop”. Ünïcödé!  two  spaces\nnew line"


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the stop said and two spaces new line"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def pieces(tokenizer, ids, stop=()) -> tuple[list[str], Detokenizer]:
    detokenizer, found = Detokenizer(tokenizer, stop), []
    for token in ids:
        detokenizer.add(token)
        if detokenizer.stopped:
            break
        found.append(detokenizer.piece())
    detokenizer.finish()
    found.append(detokenizer.piece())
    return found, detokenizer


def test_pieces_make_the_text_and_are_whole_characters(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT), "characters of several tokens are the point"
    found, detokenizer = pieces(tokenizer, ids)
    assert "".join(found) == detokenizer.text == TEXT == tokenizer.decode(ids)
    assert not any("�" in piece for piece in found)


def test_special_tokens_do_not_show(tokenizer) -> None:
    ids = tokenizer.encode("said")
    assert pieces(tokenizer, [*ids, tokenizer.eos_token_id, *ids])[1].text == "saidsaid"


def test_an_answer_that_ends_within_a_character(tokenizer) -> None:
    ids = tokenizer.encode("ab東")[:-1]
    found, detokenizer = pieces(tokenizer, ids)
    assert detokenizer.text == "".join(found) == tokenizer.decode(ids) and detokenizer.text.startswith("ab�")


@pytest.mark.parametrize("stop", ["stop", "🌧", "said: “st", "\n", "T", "の天気"])
def test_a_stop_string_over_any_tokens(tokenizer, stop: str) -> None:
    found, detokenizer = pieces(tokenizer, tokenizer.encode(TEXT), ("never there", stop))
    assert detokenizer.stopped
    assert detokenizer.text == "".join(found) == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stop_strings(tokenizer) -> None:
    _, detokenizer = pieces(tokenizer, tokenizer.encode(TEXT), ("spaces", "two", "said"))
    assert detokenizer.text == TEXT[: TEXT.index("said")]


def test_what_may_become_a_stop_string_is_held_back(tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["and more"])
    for token in tokenizer.encode("x and m"):
        detokenizer.add(token)
    assert detokenizer.piece() == "x "
    for token in tokenizer.encode("y"):
        detokenizer.add(token)
    assert detokenizer.piece() == "and my"
    assert not detokenizer.stopped
