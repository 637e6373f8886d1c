"""Tests of `patchattn.demo`: the shipped model loads offline and does what its card says."""

from __future__ import annotations

import pytest
import torch

from patchattn import demo
from patchattn.evaluation.documents import make_document, tokenize_text


@pytest.fixture(scope="module")
def shipped():
    return demo.load()


def test_shipped_model_has_the_shape_of_its_card(shipped):
    model, tokenizer = shipped
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 2)
    assert len(tokenizer) == model.config.vocab_size == 1024


def test_folder_holds_no_pickle_and_stays_small():
    files = list(demo.model_folder().iterdir())
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 12e6


def test_tokens_of_a_text_are_those_of_its_lines(shipped):
    _, tokenizer = shipped
    sample = demo.sample_text()[:20_000]
    lines = tokenize_text(sample, tokenizer)
    whole = tokenizer(sample)["input_ids"]
    assert whole == [tokenizer.bos_token_id, *(token for line in lines.tokens for token in line)]
    assert tokenizer.decode(whole, skip_special_tokens=True) == sample


def test_shipped_model_looks_up_facts_and_continues_text(shipped):
    model, tokenizer = shipped
    text = tokenize_text(demo.sample_text(), tokenizer)
    right = asked = 0
    for seed in range(4):
        document = make_document(text, tokenizer, length=1024, kinds=("fact",) * 6, seed=seed)
        tokens = torch.tensor([document.token_ids])
        with torch.no_grad():
            logits = model(tokens).logits[0].float()
        best = logits.argmax(-1)
        for question in document.questions:
            span = slice(question.answer_start, question.answer_end)
            right += bool((best[span.start - 1 : span.stop - 1] == tokens[0, span]).all())
            asked += 1
        end = document.questions[0].start
        loss = torch.nn.functional.cross_entropy(logits[: end - 1], tokens[0, 1:end])
        # A uniform guess has log(1024) = 6.9 nats.
        assert loss < 3.5
    assert right >= 0.9 * asked


def test_generation_answers_a_question(shipped):
    model, tokenizer = shipped
    text = tokenize_text(demo.sample_text(), tokenizer)
    document = make_document(text, tokenizer, length=1024, kinds=("fact",) * 6, seed=1)
    prompt = torch.tensor([document.prompt(0)])
    question = document.questions[0]
    n_answer = question.answer_end - question.answer_start
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_answer, do_sample=False)
    assert tokenizer.decode(generated[0, prompt.shape[1] :]) == question.answer
