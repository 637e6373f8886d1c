"""Drafts in all that `generate` does beside writing greedily: sampling, streaming, scores, stop strings, threads."""

import itertools
import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

import patchattn
from patchattn import ClosedGate, Policy
from patchattn.testing import tiny_model

CLOSED = Policy(sink_size=2, window_size=6, min_bulk=0, gate=ClosedGate())
TEXT = torch.randint(2, 128, (1, 40), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 20, "do_sample": False}


def probabilities(model, text, new, top_k, temperature):
    """The probability of each text that sampling may write, from dense logits."""
    found = {(): 1.0}
    for _ in range(new):
        longer = {}
        rows = torch.cat([torch.cat([text, torch.tensor([tokens], dtype=torch.long)], 1) for tokens in found])
        best = (model(rows).logits[:, -1].float() / temperature).topk(top_k)
        for (tokens, before), chances, following in zip(
            found.items(), best.values.softmax(-1).tolist(), best.indices.tolist(), strict=True
        ):
            for token, chance in zip(following, chances, strict=True):
                longer[(*tokens, token)] = before * chance
        found = longer
    return found


@pytest.mark.parametrize("tokens", [1, 3])
def test_sampled_texts_have_the_distribution_of_dense_ones(tokens):
    """Chi-square of the texts of three tokens, of which the first comes from the prompt and the others are drafted.

    With this prompt drafts are far from dense attention: a wrong probability shows in a few hundred texts.
    """
    model, n, new, options = tiny_model("llama"), 400, 3, {"top_k": 3, "temperature": 0.6}
    prompt = torch.randint(2, 128, (1, 40), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        chances = probabilities(model, prompt, new, **options)
    counts = dict.fromkeys(chances, 0)
    torch.manual_seed(tokens)
    with patchattn.draft(model, CLOSED.model_copy(update={"layers": (1, 2)}), tokens=tokens) as handle:
        for _ in range(n):
            text = model.generate(prompt, max_new_tokens=new, do_sample=True, **options)
            counts[tuple(text[0, 40:].tolist())] += 1
    drafts = handle.report().drafts
    assert 0.1 < drafts.acceptance < 0.9
    likely = [text for text, chance in chances.items() if chance * n >= 5]
    seen = [counts[text] for text in likely]
    expected = [chances[text] * n for text in likely]
    if (rest := n - sum(expected)) > 1:
        seen, expected = [*seen, n - sum(seen)], [*expected, rest]
    assert len(likely) > 10
    statistic = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True))
    degrees = len(seen) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_certain_next_token_is_sampled():
    model = tiny_model("llama")
    want = model.generate(TEXT, **GREEDY)
    with patchattn.draft(model, CLOSED, tokens=3):
        assert torch.equal(model.generate(TEXT, max_new_tokens=20, do_sample=True, top_k=1), want)


def words():
    # transformers measures words by what it finds behind this one.
    known = {f"w{token}.": token for token in range(128)} | {"abcdef": 128}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(known, unk_token="w0.")))


def test_streamed_tokens_are_those_returned():
    class Keeper:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    model, keeper = tiny_model("llama"), Keeper()
    with patchattn.draft(model, CLOSED, tokens=3):
        text = model.generate(TEXT, streamer=keeper, **GREEDY)
    assert keeper.ended
    assert keeper.tokens == text[0].tolist()


def test_scores_are_those_of_dense_attention():
    model, options = tiny_model("llama").double(), {"return_dict_in_generate": True, "output_scores": True, **GREEDY}
    want = model.generate(TEXT, **options)
    with patchattn.draft(model, CLOSED, tokens=3):
        got = model.generate(TEXT, **options)
    assert torch.equal(want.sequences, got.sequences)
    assert len(want.scores) == len(got.scores)
    for a, b in zip(want.scores, got.scores, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-5)


@pytest.mark.parametrize("at", [2, 3, 4, 9])
def test_stop_strings(at):
    model, tokenizer = tiny_model("llama"), words()
    token = model.generate(TEXT, **GREEDY)[0, 40 + at].item()
    options = {"stop_strings": [f"w{token}."], "tokenizer": tokenizer, **GREEDY}
    want = model.generate(TEXT, **options)
    with patchattn.draft(model, CLOSED.model_copy(update={"gate": patchattn.OpenGate()}), tokens=4):
        assert torch.equal(model.generate(TEXT, **options), want)


def test_texts_of_several_threads_do_not_mix():
    model = tiny_model("llama")
    texts = [TEXT, TEXT + 0, TEXT.flip(1)]
    want = [model.generate(text, **GREEDY) for text in texts]
    got = [None] * 3
    with patchattn.draft(model, CLOSED, tokens=3):

        def write(number):
            got[number] = model.generate(texts[number], **GREEDY)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(itertools.starmap(torch.equal, zip(want, got, strict=True)))


def test_a_streamer_in_a_thread():
    model, tokenizer = tiny_model("llama"), words()
    want = tokenizer.decode(model.generate(TEXT, **GREEDY)[0, 40:])
    with patchattn.draft(model, CLOSED, tokens=3):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        thread = threading.Thread(target=model.generate, args=(TEXT,), kwargs={"streamer": streamer, **GREEDY})
        thread.start()
        got = "".join(streamer)
        thread.join()
    assert got.split() == want.split()
