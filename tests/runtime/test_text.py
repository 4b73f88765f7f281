"""Token ids against a pipeline's own encoding, on a tokenizer that the test writes itself."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from heatsink.runtime.errors import ModelError
from heatsink.runtime.text import PromptTruncated, Tokenizer, Truncation

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["r e", "re d</w>", "a p", "p l", "ap pl", "appl e</w>", "c a", "ca t</w>"]
LENGTH = 8


def write_tokenizer(folder: Path, pad: str = END, length: int | None = LENGTH) -> Path:
    """A CLIP tokenizer of single letters, a few merges and the two marks."""
    folder.mkdir()
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(merge.split()) for merge in MERGES] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    config: dict[str, object] = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    if length is not None:
        config["model_max_length"] = length
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


def ids_of(folder: Path, *tokens: str) -> list[int]:
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    return [vocabulary[token] for token in tokens]


def test_ids_are_start_tokens_end_padding(folder: Path) -> None:
    ids, cuts = Tokenizer(folder).encode(["Red  apple", ""])
    assert ids.dtype == np.int64
    assert ids[0].tolist() == ids_of(folder, START, "red</w>", "apple</w>", *[END] * 5)
    assert ids[1].tolist() == ids_of(folder, START, *[END] * 7)
    assert cuts == [None, None]


def test_the_second_tokenizer_pads_with_its_own_token(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer_2", pad="!")
    ids, _ = Tokenizer(folder).encode(["red"])
    assert ids[0].tolist() == ids_of(folder, START, "red</w>", END, *["!"] * 5)


def test_a_long_prompt_is_cut_and_says_what(folder: Path) -> None:
    prompt = "red apple red apple red apple cat cat red"
    with pytest.warns(PromptTruncated, match="the last 3 are not used: 'cat cat red'"):
        ids, cuts = Tokenizer(folder).encode(["cat", prompt])
    pair = ["red</w>", "apple</w>"]
    assert ids[1].tolist() == ids_of(folder, START, *pair * 3, END)
    assert cuts[0] is None
    assert cuts[1] == Truncation(prompt, "cat cat red", removed_tokens=3, max_length=LENGTH)


def test_a_prompt_that_just_fits_is_not_cut(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, cuts = Tokenizer(folder).encode(["cat " * (LENGTH - 2)])
    assert cuts == [None]
    assert ids[0].tolist() == ids_of(folder, START, *["cat</w>"] * (LENGTH - 2), END)


@pytest.mark.parametrize("pad", [END, "!"])
def test_ids_equal_those_of_a_diffusers_pipeline(tmp_path: Path, pad: str) -> None:
    """The call that StableDiffusionPipeline.encode_prompt makes, on the class its index names."""
    from transformers import CLIPTokenizer

    folder = write_tokenizer(tmp_path / "tokenizer", pad=pad)
    prompts = [
        "a red apple!",
        "",
        "x" * 30,
        "CAT, cat; red-apple 42",
        "caf\u00e9 \u4f60\u597d",
        "cat " * 9,
    ]
    theirs = CLIPTokenizer.from_pretrained(folder)
    expected = theirs(
        prompts,
        padding="max_length",
        max_length=theirs.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.numpy()
    untruncated = theirs(prompts, padding="longest", return_tensors="pt").input_ids
    removed = theirs.batch_decode(untruncated[:, LENGTH - 1 : -1])
    with pytest.warns(PromptTruncated):
        ids, cuts = Tokenizer(folder).encode(prompts)
    np.testing.assert_array_equal(ids, expected)
    # The longest prompt's note is theirs too; of shorter ones theirs also shows the padding.
    assert cuts[2] is not None
    assert cuts[2].removed == removed[2]
    assert [cut is not None for cut in cuts] == [
        len(theirs(prompt).input_ids) > LENGTH for prompt in prompts
    ]


def test_ids_do_not_depend_on_the_batch(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    prompts = ["red", "cat apple", "", "x y z"]
    together, _ = tokenizer.encode(prompts)
    alone = np.concatenate([tokenizer.encode([prompt])[0] for prompt in prompts])
    np.testing.assert_array_equal(together, alone)
    assert tokenizer.encode([])[0].shape == (0, LENGTH)


def test_threads_share_a_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    expected, _ = tokenizer.encode(["red cat"])
    results: list[bool] = []

    def work() -> None:
        for _ in range(50):
            results.append(bool((tokenizer.encode(["red cat"])[0] == expected).all()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 200


def test_max_length_overrides_and_is_required_where_the_folder_has_none(
    tmp_path: Path, folder: Path
) -> None:
    assert Tokenizer(folder, max_length=5).encode(["red"])[0].shape == (1, 5)
    assert Tokenizer(folder).max_length == LENGTH
    endless = write_tokenizer(tmp_path / "endless", length=None)
    with pytest.raises(ModelError, match="model_max_length: expected the length"):
        Tokenizer(endless).encode(["red"])
    assert Tokenizer(endless, max_length=6).max_length == 6


def test_bad_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer: expected a folder, got .*absent"):
        Tokenizer(tmp_path / "absent")
    with pytest.raises(ModelError, match="max_length: expected at least 2 tokens, got 1"):
        Tokenizer(folder, max_length=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ModelError, match=r"empty: expected tokenizer.json, or vocab.json and merges"
    ):
        Tokenizer(tmp_path / "empty").encode(["red"])
    (folder / "vocab.json").write_text("{", "utf-8")
    with pytest.raises(ModelError, match="can't load the tokenizer"):
        Tokenizer(folder).encode(["red"])


def test_foreign_tokenizer_classes_are_refused(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "tokenizer_class": "Evil"}))
    with pytest.raises(
        ModelError, match=r"tokenizer_class: expected one of CLIPTokenizer.*got Evil"
    ):
        Tokenizer(folder).encode(["red"])
