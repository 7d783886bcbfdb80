"""Draft models with other tokens: texts there and back, tokens that stay those of stock, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from cases import build, entry, tiny
from fingerprint import changes, fingerprint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_accel_patch
from hf_accel_patch import Speculative, UnsupportedModel, patch, report, unpatch
from hf_accel_patch.ops.pacing import Pace
from hf_accel_patch.passes import drafts
from hf_accel_patch.passes.drafts import ModelDrafter
from hf_accel_patch.passes.translating import Translation, between

FOLDER = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"
TEXT = 'def add(first, second):\n    """The sum, naïve: “è” → ∑."""\n    total = first + second\n    return total\n\n\n'
TEXT += "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def bundled():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def wrapped(plain, **special):
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


@pytest.fixture(scope="module")
def others(tokenizer):
    """Tokenizers with other pieces: few merges of bytes, words with the space before them as a sign, characters."""
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_.train_from_iterator([TEXT * 3], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"], initial_alphabet=sorted(set(TEXT)))
    words.train_from_iterator([TEXT * 3], trainer)
    return {"bytes": wrapped(bytes_), "words": wrapped(words, bos_token="<s>", unk_token="<unk>")}


@pytest.fixture(scope="module")
def shuffled(tokenizer):
    """The same pieces under other numbers, and these numbers."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    order = [0, *(1 + torch.randperm(len(tokenizer) - 1, generator=torch.Generator().manual_seed(0))).tolist()]
    described["model"]["vocab"] = {piece: order[at] for piece, at in described["model"]["vocab"].items()}
    return wrapped(Tokenizer.from_str(json.dumps(described)), eos_token="<|endoftext|>"), torch.tensor(order)


@pytest.fixture
def renumbered(bundled, shuffled):
    """The bundled model for these numbers."""
    model, order = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(), shuffled[1]
    with torch.no_grad():
        for held in {each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings())}:
            held[order] = held.clone()
    return model


@pytest.fixture
def always(monkeypatch):
    """Only models draft, up to four tokens, and go on where they are not sure."""
    monkeypatch.setattr(Pace, "choose", lambda self, guesses, cost=0.0: min(max(each.most for each in guesses), 4))
    monkeypatch.setattr(ModelDrafter, "least", 99)
    monkeypatch.setattr(drafts, "DOUBT", 0.0)


def generate(model, given, new=24, **options):
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0} | options
    return model.generate(**given, **options)


# Texts


@pytest.mark.parametrize("name", ["bytes", "words", "shuffled"])
def test_a_draft_goes_on_where_the_text_ends(name, tokenizer, others, shuffled):
    """From every place at which a token ends: the text is that of the draft model's, and comes to the same tokens, but
    for a last one that was cut, unless a word is."""
    other = shuffled[0] if name == "shuffled" else others[name]
    translation, tokens = Translation(tokenizer, other), tokenizer(TEXT)["input_ids"]
    found = missed = 0
    for place in range(2, len(tokens) - 4):
        theirs = translation.into(tokens[:place])
        if not theirs:
            assert "\ufffd" in tokenizer.decode(tokens[:place])[-1]
            continue
        whole = other(TEXT)["input_ids"]
        if whole[: len(theirs)] != theirs:
            continue  # a word that the other tokenizer writes in another way when it goes on
        drafted = whole[len(theirs) : len(theirs) + 6]
        back = translation.back(tokens[:place], theirs, drafted)
        missed += not back
        if back:
            found += 1
            before, after = (tokenizer.decode(each) for each in (tokens[:place], [*tokens[:place], *back]))
            text = (other.decode(theirs), other.decode([*theirs, *drafted]).rstrip("\ufffd"))
            assert after[len(before) :] == text[1][len(text[0]) :]
            assert name != "shuffled" or back[:-1] == tokens[place : place + len(back) - 1]
    assert found > 20 and missed <= found / 10


def test_what_cannot_be_translated_gives_nothing(tokenizer, others):
    translation = Translation(tokenizer, others["bytes"])
    half = tokenizer("na")["input_ids"] + tokenizer("∑")["input_ids"][:1]
    assert tokenizer.decode(half).endswith("\ufffd") and translation.into(half) == []
    assert translation.into([]) == translation.into([0, 0]) == [], "nothing but special tokens"
    theirs = translation.into(tokenizer("return tot")["input_ids"])
    assert translation.back(tokenizer("return tot")["input_ids"], theirs, []) == []
    word, rest = tokenizer("retu")["input_ids"], others["bytes"]("rn")["input_ids"]
    assert tokenizer("return")["input_ids"][0] not in word, "they are other tokens if it goes on"
    assert translation.back(word, translation.into(word), rest) == []


# Models


@pytest.mark.parametrize("sample", [False, True])
def test_a_model_with_other_numbers_is_right(sample, bundled, renumbered, tokenizer, shuffled, always):
    """For sequences of other lengths too, which transformers' own does not take."""
    prompts = [TEXT, "import os\n\n\ndef files(folder):\n"]
    for given in (
        tokenizer(TEXT, return_tensors="pt"),
        tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"),
    ):
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
        expected = generate(bundled, given, do_sample=sample)
        patch(bundled, speculative=Speculative(draft=renumbered, tokenizer=tokenizer, draft_tokenizer=shuffled[0]))
        assert torch.equal(generate(bundled, given, do_sample=sample), expected)
        said = entry(report(bundled).to_dict(), "speculative")
        assert "fallbacks" not in said and (sample or said["acceptance"] > 0.85), said
        unpatch(bundled)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["bytes", "words"])
def test_a_model_that_is_wrong_changes_nothing(name, family, bundled, tokenizer, others, always):
    """Mistral has a window, out of which its text goes back where a word that grows has other tokens."""
    draft = build(family, vocab_size=len(others[name]))
    given = dict(tokenizer(TEXT, return_tensors="pt"))
    given.pop("token_type_ids", None)
    expected = generate(bundled, given, 40)
    patch(bundled, speculative=Speculative(draft=draft, draft_tokenizer=others[name]))
    assert torch.equal(generate(bundled, given, 40), expected)
    said = entry(report(bundled).to_dict(), "speculative")
    assert said["tokens"] == 39 and said["acceptance"] < 0.5 and "fallbacks" not in said


UNREADABLE = {  # the draft model's tokenizer, its rows, the text, whether it drafts nothing at all
    "a text without tokens": ({"unk_token": "[UNK]"}, 32, "\n\n    \n", False),
    "a word without a token": ({}, 32, TEXT, True),
    "a token without a row": ({"unk_token": "[UNK]"}, 2, "return total\n", True),
}


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_text_that_the_draft_model_cannot_read(name, batch, bundled, tokenizer, always, warned):
    """It waits until there is something to read; a tokenizer that fails is told of once."""
    special, rows, text, never = UNREADABLE[name]
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "def": 1, "return": 2, "total": 3}, **special))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [text, "def add(first, second):\n"] if batch else [text]
    given = dict(tokenizer(texts, return_tensors="pt", padding=batch, padding_side="left"))
    given.pop("token_type_ids", None)
    expected = generate(bundled, given)
    options = {"tokenizer": tokenizer, "draft_tokenizer": wrapped(words, **special)}
    patch(bundled, speculative=Speculative(draft=build("llama", vocab_size=rows), **options))
    assert torch.equal(generate(bundled, given), expected) and torch.equal(generate(bundled, given), expected)
    tally = vars(bundled)["_hf_accel_speculating"].tally
    assert tally.tokens == 46 and (tally.drafted == 0) == never and not tally.fallbacks
    assert ["a tokenizer fails" in line for line in warned()] == [True] * (not special), warned()


@pytest.mark.parametrize("rows", [4096 + 64, 4096 - 96])
def test_the_same_tokens_in_models_of_other_sizes(rows, bundled, tokenizer, always):
    """Families round the number of rows up, each model its own way."""
    draft = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    draft.resize_token_embeddings(rows, mean_resizing=False)
    if rows > len(tokenizer):
        with torch.no_grad():
            draft.get_output_embeddings().weight[len(tokenizer) :] *= 1e3
    given = {"input_ids": tokenizer(TEXT, return_tensors="pt").input_ids}
    expected = generate(bundled, given)
    patch(bundled, speculative=Speculative(draft=draft, tokenizer=tokenizer, draft_tokenizer=tokenizer))
    assert vars(bundled)["_hf_accel_speculating"].translation is None
    assert torch.equal(generate(bundled, given), expected)
    said = entry(report(bundled).to_dict(), "speculative")
    assert said["tokens"] == 23 and (rows < len(tokenizer) or said["acceptance"] > 0.9)


def test_tokens_that_the_draft_model_has_not_are_not_read(always):
    model, draft = tiny("llama"), build("llama", vocab_size=99)
    given = {"input_ids": torch.tensor([[5, 7, 120, 9]])}
    assert between(model, draft, NUMBERS, NUMBERS) is None
    expected = generate(model, given)
    patch(model, speculative=Speculative(draft=draft, tokenizer=NUMBERS, draft_tokenizer=NUMBERS))
    assert torch.equal(generate(model, given), expected)
    assert entry(report(model).to_dict(), "speculative")["acceptance"] == 0


class Numbers:
    """All that a tokenizer is asked for where the tokens are the same."""

    def get_vocab(self):
        return {str(number): number for number in range(256)}


NUMBERS = Numbers()


# What is refused


def test_without_tokenizers_it_is_refused(tokenizer, bundled, others, tmp_path):
    model = tiny("llama")
    before = fingerprint(model)
    draft = build("llama", vocab_size=99)
    with pytest.raises(UnsupportedModel, match="99 tokens, the model 256, and there is no tokenizer at ''"):
        patch(model, speculative=Speculative(draft=draft))
    with pytest.raises(UnsupportedModel, match="there is no draft_tokenizer at ''"):
        patch(bundled, speculative=Speculative(draft=draft))
    draft.name_or_path = str(tmp_path / "nothing")
    with pytest.raises(UnsupportedModel, match=r"there is no draft_tokenizer at '.*nothing'"):
        patch(bundled, speculative=Speculative(draft=draft))
    with pytest.raises(ValueError, match="tokenizer and draft_tokenizer are for draft="):
        Speculative(tokenizer=tokenizer)
    assert not changes(before, fingerprint(model))
    others["bytes"].save_pretrained(tmp_path / "draft")
    found = build("llama", vocab_size=len(others["bytes"]))
    found.save_pretrained(tmp_path / "draft")
    patch(bundled, speculative=Speculative(draft=AutoModelForCausalLM.from_pretrained(tmp_path / "draft")))
    assert isinstance(vars(bundled)["_hf_accel_speculating"].translation, Translation)
