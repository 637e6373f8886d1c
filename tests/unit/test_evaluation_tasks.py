"""Every task: exact lengths, answers where they belong, the same from the same seed, scores of right and wrong."""

from __future__ import annotations

import hashlib
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from patchattn import demo
from patchattn.evaluation import GROUPS, TASKS, DocumentError, Material, make_sample
from patchattn.evaluation.sample import recall
from patchattn.evaluation.tasks import DRAWN, TEXT_LOSS, chosen_tasks
from patchattn.evaluation.units import cut

PROMPTS = tuple(task for task in TASKS if task != TEXT_LOSS)
ANSWER_ONCE = (*(task for task in PROMPTS if task.startswith("niah")), "kv", "copy", "fact")
SAMPLE = "".join(f"Line {at} of a text about nothing.\n" for at in range(600))


def byte_level(*, bos: bool) -> PreTrainedTokenizerFast:
    """One token for each byte; `bos` is put before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({"<s>": 0} | {byte: at + 1 for at, byte in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    if bos:
        bytes_only.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>" if bos else None)


def characters() -> PreTrainedTokenizerFast:
    """Words are characters, and line breaks have no token; no BOS, and nothing for what it does not know."""
    vocabulary = {character: at for at, character in enumerate(string.printable.replace("\n", ""))}
    words = Tokenizer(models.WordLevel(vocabulary | {"?!": len(vocabulary)}, unk_token="?!"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Split("", "isolated")]
    )
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?!")


def metaspace() -> PreTrainedTokenizerFast:
    """Puts a space before every text, as SentencePiece models do; some pairs of letters are one token."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    merges = [("a", "n"), ("e", "r"), ("1", "2"), ("▁", "t"), ("i", "s")]
    tokens = ["<s>", "<unk>", *letters, *(a + b for a, b in merges)]
    pieces = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces.decoder = decoders.Metaspace(prepend_scheme="always")
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", unk_token="<unk>")


MADE = {
    "bytes": lambda: byte_level(bos=True),
    "bytes without BOS": lambda: byte_level(bos=False),
    "characters": characters,
    "metaspace": metaspace,
    "shipped": lambda: demo.load()[1],
}
_MATERIAL: dict[str, Material] = {}


def material(name: str) -> Material:
    if name not in _MATERIAL:
        _MATERIAL[name] = Material(SAMPLE, MADE[name]())
    return _MATERIAL[name]


@settings(max_examples=50)
@given(st.sampled_from(PROMPTS), st.sampled_from(list(MADE)), st.integers(3000, 6000), st.integers(0, 99))
def test_lengths_are_exact_and_seeds_decide(task: str, name: str, length: int, seed: int) -> None:
    sample = make_sample(task, material(name), length=length, seed=seed)
    assert len(sample.prompt) + sample.budget == length
    assert len(sample.target) <= sample.budget
    begin = material(name).begin
    assert sample.prompt[: len(begin)] == begin
    assert sample == make_sample(task, material(name), length=length, seed=seed)
    assert sample.prompt != make_sample(task, material(name), length=length, seed=seed + 1).prompt


@settings(max_examples=40)
@given(st.sampled_from(PROMPTS), st.sampled_from(list(MADE)), st.integers(0, 99))
def test_right_answers_score_one_and_others_zero(task: str, name: str, seed: int) -> None:
    tokenizer = material(name).tokenizer
    sample = make_sample(task, material(name), length=6000, seed=seed)
    assert sample.score(sample.target, tokenizer) == 1
    assert sample.score([*sample.target, *sample.target], tokenizer) == 1
    assert sample.score([], tokenizer) == 0
    other = make_sample(task, material(name), length=6000, seed=f"{seed}/other")
    if not any(mine in others for mine in sample.answers for others in other.answers):
        assert sample.score(other.target, tokenizer) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("task", ANSWER_ONCE)
def test_the_answer_is_in_the_prompt_once_where_it_was_planted(task: str, seed: int) -> None:
    tokenizer = material("shipped").tokenizer
    sample = make_sample(task, material("shipped"), length=2048, seed=seed)
    planted = "".join(tokenizer.decode(sample.prompt[start:end]) for start, end in sample.planted)
    for answer in sample.answers:
        assert tokenizer.decode(sample.prompt).count(answer) == 1
        assert planted.count(answer) == 1


@pytest.mark.parametrize("seed", range(4))
def test_keys_and_questions_of_needles(seed: int) -> None:
    tokenizer = material("shipped").tokenizer
    for task, needles, answers, asked in (
        ("niah_single_1", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 4, 4, 1),
        ("niah_multiquery", 4, 4, 4),
    ):
        sample = make_sample(task, material("shipped"), length=2048, seed=seed)
        planted = [tokenizer.decode(sample.prompt[start:end]) for start, end in sample.planted]
        assert len(planted) == needles
        assert len(sample.answers) == answers
        question = tokenizer.decode(sample.prompt).split("The text is over.")[1].split("?")[0]
        keys = {line.split(" for ")[1].split(" is: ")[0] for line in planted}
        assert sum(key in question for key in keys) == asked
        for answer in sample.answers:
            (line,) = [line for line in planted if answer in line]
            assert line.split(" for ")[1].split(" is: ")[0] in question


@pytest.mark.parametrize("seed", range(4))
def test_variables_form_a_chain(seed: int) -> None:
    tokenizer = material("shipped").tokenizer
    sample = make_sample("vt", material("shipped"), length=2048, seed=seed)
    lines = [tokenizer.decode(sample.prompt[start:end]).split() for start, end in sample.planted]
    assert len(lines) == len(sample.answers) == 5
    value = lines[0][-1]
    assert f"stand for {value}:" in tokenizer.decode(sample.prompt)[-60:]
    assert [line[1] for line in lines] == list(sample.answers)
    assert [line[-1] for line in lines[1:]] == list(sample.answers[:-1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [2048, 9000])
def test_common_words_are_the_most_common(length: int, seed: int) -> None:
    tokenizer = material("shipped").tokenizer
    sample = make_sample("cwe", material("shipped"), length=length, seed=seed)
    words = tokenizer.decode(sample.prompt).rsplit("Below is", 1)[1].rsplit("Question", 1)[0].split("\n")[1:]
    counts = count([line.split(". ")[1] for line in words if ". " in line])
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    assert {counts.pop(answer) for answer in sample.answers} == {often}
    assert max(counts.values()) == seldom
    # Of the others, only those whose entries were cut are missing one.
    assert sum(times != seldom for times in counts.values()) <= 10


@pytest.mark.parametrize("length", [1024, 8192])
def test_frequent_words_are_the_most_frequent_and_follow_the_distribution(length: int) -> None:
    tokenizer = material("shipped").tokenizer
    sample = make_sample("fwe", material("shipped"), length=length)
    text = tokenizer.decode(sample.prompt).split("\n")[1]
    counts = count([word for word in text.split() if word.strip(".")])
    ranked = sorted(counts, key=lambda word: -counts[word])
    assert tuple(ranked[:3]) == sample.answers
    first, second, third, fourth = (counts[word] for word in ranked[:4])
    assert third > fourth
    # Ranks 2, 3 and 4 of a zeta distribution with exponent 2: 1/4, 1/9, 1/16.
    assert second / first == pytest.approx(4 / 9, abs=0.06)
    assert third / first == pytest.approx(4 / 16, abs=0.06)


def count(words: list[str]) -> dict[str, int]:
    return {word: words.count(word) for word in set(words)}


def test_few_shot_asks_for_a_word_that_was_not_shown() -> None:
    tokenizer = material("shipped").tokenizer
    for seed in range(8):
        prompt = tokenizer.decode(make_sample("few_shot", material("shipped"), length=1024, seed=seed).prompt)
        shown = [line.removeprefix("Word: ") for line in prompt.split("\n") if line.startswith("Word: ")]
        assert len(shown) == len(set(shown)) == 17


def test_english_asks_for_one_of_the_planted_facts() -> None:
    for name in MADE:
        tokenizer = material(name).tokenizer
        sample = make_sample("english", material(name), length=4096, seed=2)
        planted = [tokenizer.decode(sample.prompt[start:end]).strip() for start, end in sample.planted]
        assert len(planted) == 16
        lead = tokenizer.decode(sample.prompt).rpartition("Answer: ")[2]
        assert sum(f"{lead} {sample.answers[0]}" in fact for fact in planted) == 1


def turns(prompt: str, roles: tuple[str, str]) -> list[str]:
    return re.split("|".join(map(re.escape, roles)), prompt)[1:]


@pytest.mark.parametrize("bos", [True, False])
def test_a_chat_is_written_by_the_template_or_in_plain_words(bos: bool) -> None:
    tokenizer = byte_level(bos=bos)
    plain = Material(SAMPLE, byte_level(bos=bos))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}[{{ turn.role }}]{{ turn.content | trim }}[end]{% endfor %}"
        "[assistant]"
    )
    for made, roles in ((Material(SAMPLE, tokenizer), ("[user]", "[assistant]")), (plain, ("User: ", "Assistant: "))):
        sample = make_sample("chat", made, length=4000, seed=5)
        prompt = tokenizer.decode(sample.prompt)
        assert len(sample.prompt) + sample.budget == 4000
        assert prompt.count("<s>") == bos
        first, *others, question, lead = turns(prompt, roles)
        assert f"{lead} {sample.answers[0]}." in first
        assert lead.strip() not in "".join(others[1:])
        assert question.startswith("Now back to what I told you first.")
        passages = others[1::2]
        assert len(passages) == 4000 // 512 - 1
        # They continue each other, and are about as long.
        lines = "".join(passage.partition("\n\n")[2].replace("[end]", "") for passage in passages)
        assert "".join(lines.split())[-300:] in "".join(SAMPLE.split()) * 2
        assert max(map(len, passages)) < 2 * min(map(len, passages))


def test_a_template_that_swallows_turns_is_refused() -> None:
    tokenizer = byte_level(bos=False)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DocumentError, match="chat template leaves out"):
        make_sample("chat", Material(SAMPLE, tokenizer), length=3000)


@pytest.mark.parametrize("seed", range(9))
def test_code_uses_at_the_end_what_was_defined_early(seed: int) -> None:
    tokenizer = material("shipped").tokenizer
    made = Material(SAMPLE, tokenizer, code=demo.sample_text())
    sample = make_sample("code", made, length=2048, seed=seed)
    assert all(end < 0.75 * len(sample.prompt) for _, end in sample.planted)
    definitions = "".join(tokenizer.decode(sample.prompt[start:end]) for start, end in sample.planted)
    use = tokenizer.decode(sample.prompt).rpartition("\n")[2]
    assert "about nothing" not in tokenizer.decode(sample.prompt)
    completed = use + tokenizer.decode(sample.target)
    if use.startswith("def "):
        assert f"\n{completed}" in f"\n{definitions}"
    else:
        scope: dict[str, object] = {}
        exec(definitions + completed, scope)
        with pytest.raises(AssertionError):
            exec(completed[:-1], scope)


def test_needles_are_spread_over_the_whole_haystack() -> None:
    places = []
    for seed in range(60):
        sample = make_sample("niah_single_1", material("bytes"), length=4000, seed=seed)
        places.append(sample.planted[0][0] / len(sample.prompt))
    assert min(places) < 0.15
    assert max(places) > 0.85
    assert 0.35 < sum(places) / len(places) < 0.65


@pytest.mark.parametrize("task", PROMPTS)
def test_too_short_a_length_is_refused_and_says_what_is_needed(task: str) -> None:
    with pytest.raises(DocumentError, match=f"{task} needs|needs more words") as caught:
        make_sample(task, material("bytes"), length=64)
    assert "length" in caught.value.fix


def test_a_tokenizer_that_can_not_write_the_answer_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"line": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(DocumentError, match="can't write the answer"):
        make_sample("niah_single_1", Material(SAMPLE, tokenizer), length=2000)


def test_a_text_without_lines_to_copy_is_refused_for_the_task_that_needs_one() -> None:
    words = Material("word " * 400 + "\n", characters())
    with pytest.raises(DocumentError, match="The task note can't be made"):
        make_sample("note", words, length=600)
    assert make_sample("fact", words, length=600).answers


def test_empty_and_short_texts() -> None:
    for text in ("", "\n"):
        with pytest.raises(DocumentError, match="empty"):
            Material(text, characters())
    short = Material("a few words\n", characters())
    assert len(make_sample("niah_single_2", short, length=2000).prompt) < 2000  # the line is repeated
    with pytest.raises(DocumentError, match="too few to measure text loss"):
        short.stretches(100, 1)


@settings(max_examples=10)
@given(st.integers(40, 2000), st.integers(1, 9))
def test_stretches_do_not_overlap(length: int, most: int) -> None:
    made = material("bytes")
    stretches = made.stretches(length, most)
    assert 1 <= len(stretches) <= most
    assert {len(stretch) for stretch in stretches} == {length}
    text = [token for line in made.text.tokens for token in line]
    begin = len(made.begin)
    end = 0
    for stretch in stretches:
        body = list(stretch[begin:])
        end += next(at for at in range(len(text) - end) if text[end + at : end + at + len(body)] == body) + len(body)


SAMPLES = {
    "niah_single_1": "4c92106f",
    "niah_single_2": "58a8f426",
    "niah_single_3": "e22e2674",
    "niah_multikey_1": "69404dc7",
    "niah_multikey_2": "cddf6bb5",
    "niah_multikey_3": "cea4c6b6",
    "niah_multivalue": "1e5c3a55",
    "niah_multiquery": "5acd3a30",
    "vt": "d6649b61",
    "cwe": "2d89aac4",
    "fwe": "379e26de",
    "kv": "e1baef64",
    "copy": "3edd600b",
    "few_shot": "7b059841",
    "english": "ddd165b3",
    "chat": "20d1a497",
    "code": "e845c58c",
    "fact": "254ec156",
    "chain": "a8fe26e4",
    "list": "dee5eab1",
    "note": "96c66c42",
}


@pytest.mark.parametrize("task", SAMPLES)
def test_samples_are_the_same_in_every_process_and_every_version(task: str) -> None:
    sample = make_sample(task, material("bytes"), length=3000, seed=7)
    assert hashlib.sha256(repr(sample).encode()).hexdigest()[:8] == SAMPLES[task]


def test_every_task_is_described() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "tasks.md").read_text()
    rows = [line for line in page.split("\n") if line.startswith("| `") and not line.startswith(f"| `{TEXT_LOSS}`")]
    assert [row.split(" | ")[0] for row in rows] == [f"| `{task}`" for task in DRAWN]
    assert all(text.strip() for row in rows for text in row.split("|")[1:-1])


def test_unknown_tasks_and_groups() -> None:
    assert chosen_tasks(["shipped", "fact", "vt"]) == ("fact", "chain", "list", "note", "text", "vt")
    assert len(GROUPS["ruler"]) == 11
    for call in (lambda: chosen_tasks(["riddle"]), lambda: make_sample("riddle", material("bytes"), length=100)):
        with pytest.raises(DocumentError, match="no task 'riddle'"):
            call()


@pytest.mark.parametrize("name", MADE)
def test_pieces_are_encoded_as_within_a_text(name: str) -> None:
    tokenizer = material(name).tokenizer
    made = material(name)
    lines = ["The first line.\n", "And 12 words is another\n", "'Quoted', and an end"]
    together = tokenizer("x\n" + "".join(lines), add_special_tokens=False)["input_ids"]
    pieces = [token for ids in made.encode(lines) for token in ids]
    assert together[-len(pieces) :] == pieces
    assert tokenizer("x", add_special_tokens=True)["input_ids"][: len(made.begin)] == list(made.begin)


@given(st.lists(st.integers(0, 5), max_size=8), st.data())
def test_cut_keeps_the_end(sizes: list[int], data: st.DataObject) -> None:
    units = [tuple(range(10 * at, 10 * at + size)) for at, size in enumerate(sizes)]
    flat = [token for unit in units for token in unit]
    size = data.draw(st.integers(0, len(flat)))
    assert [token for unit in cut(units, size) for token in unit] == flat[len(flat) - size :]


def test_recall_ignores_case_and_control_characters() -> None:
    assert recall("Ab\x00 12", ["aB", "12", "3"]) == pytest.approx(2 / 3)
