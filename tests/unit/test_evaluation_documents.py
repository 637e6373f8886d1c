"""Tests of `patchattn.evaluation.documents`."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from patchattn import demo
from patchattn.evaluation.documents import is_test_key, make_document, tokenize_text

KINDS = ("fact", "chain", "list", "note")
SAMPLE = "".join(f"def function_{i}(argument):\n    return argument + {i}\n\n" for i in range(300))

_START = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


def _byte_level(*, bos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, which puts its BOS token before a text or only names it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    if bos:
        tokenizer.post_processor = _START
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def _metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, as SentencePiece models do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.post_processor = _START
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(
    scope="module",
    params=[
        lambda: _byte_level(bos=True),
        lambda: _byte_level(bos=False),
        _metaspace,
        lambda: demo.load()[1],
    ],
    ids=["byte-level", "byte-level-no-bos", "metaspace", "shipped"],
)
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def text(tokenizer):
    return tokenize_text(SAMPLE, tokenizer)


@pytest.mark.parametrize("ask", ["end", "throughout"])
@pytest.mark.parametrize("seed", range(5))
def test_document_has_the_exact_length(tokenizer, text, ask, seed):
    document = make_document(text, tokenizer, length=3001, kinds=KINDS * 2, seed=seed, ask=ask)
    assert len(document.token_ids) == 3001
    assert len(document.questions) == 8
    (first,) = tokenizer("")["input_ids"] or [None]
    assert (document.token_ids[0] == tokenizer.bos_token_id) == (first is not None)


def test_same_arguments_give_the_same_document(tokenizer, text):
    first, second, other = (make_document(text, tokenizer, length=2000, kinds=KINDS, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert first.token_ids != other.token_ids


@pytest.mark.parametrize("ask", ["end", "throughout"])
def test_answers_stand_at_their_spans(tokenizer, text, ask):
    document = make_document(text, tokenizer, length=3000, kinds=KINDS * 3, seed=3, ask=ask)
    for question in document.questions:
        ids = document.token_ids
        answer = tokenizer.decode(ids[question.answer_start : question.answer_end])
        prompt = tokenizer.decode(ids[question.start : question.answer_start])
        assert answer.strip() == question.answer.strip()
        assert prompt.strip() == question.prompt.strip()


@pytest.mark.parametrize("ask", ["end", "throughout"])
def test_questions_follow_what_they_ask_for(tokenizer, text, ask):
    document = make_document(text, tokenizer, length=3000, kinds=KINDS * 3, seed=4, ask=ask)
    starts = [start for start, _ in document.planted]
    assert starts == sorted(starts)
    for question in document.questions:
        assert question.planted_at in starts
        assert question.planted_at < question.start < question.answer_start < question.answer_end
    if ask == "end":
        assert min(q.start for q in document.questions) >= max(end for _, end in document.planted)


def test_planted_fact_holds_the_answer(tokenizer, text):
    document = make_document(text, tokenizer, length=3000, kinds=("fact",) * 10, seed=5)
    planted = {start: tokenizer.decode(document.token_ids[start:end]) for start, end in document.planted}
    for question in document.questions:
        assert planted[question.planted_at].strip().endswith(f"={question.answer}")


def test_depth_places_the_planted_lines(tokenizer, text):
    document = make_document(text, tokenizer, length=3000, kinds=("fact",) * 3, seed=6, depth=(0.5, 0.6))
    questions_at = document.questions[0].start
    for start, _ in document.planted:
        assert 0.4 < start / questions_at < 0.7


def test_prompt_ends_right_before_the_answer_and_leaves_the_others_out(tokenizer, text):
    document = make_document(text, tokenizer, length=3000, kinds=("fact",) * 5, seed=7)
    prompt = tokenizer.decode(document.prompt(3)).rstrip()
    assert prompt.endswith(document.questions[3].prompt)
    assert document.questions[0].prompt not in prompt[-2 * len(document.questions[3].prompt) :]
    planted_before = document.questions[0].start
    assert document.prompt(3)[:planted_before] == document.token_ids[:planted_before]


@pytest.mark.parametrize("split", ["train", "test"])
def test_keys_of_the_two_splits_never_meet(tokenizer, text, split):
    document = make_document(text, tokenizer, length=3000, kinds=("fact",) * 20, seed=8, split=split)
    for question in document.questions:
        start = question.planted_at
        end = next(end for begin, end in document.planted if begin == start)
        key = tokenizer.decode(document.token_ids[start:end]).split()[1]
        assert is_test_key(key) == (split == "test")


def test_too_many_tasks_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="plant fewer tasks"):
        make_document(text, tokenizer, length=100, kinds=("fact",) * 20)


def test_unknown_kind_and_empty_text_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="unknown kind"):
        make_document(text, tokenizer, length=1000, kinds=("riddle",))
    with pytest.raises(ValueError, match="no lines"):
        make_document(tokenize_text("", tokenizer), tokenizer, length=1000, kinds=("fact",))
