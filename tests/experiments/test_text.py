"""Text for experiments: tokenizers, sources, streams, windows, WikiText's spacing, perplexity."""

from __future__ import annotations

import lzma
import math
import pickle
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tokendyn.errors import DataError, NonFiniteError
from tokendyn.experiments._text import _tokenizers
from tokendyn.experiments._text._perplexity import perplexity
from tokendyn.experiments._text._sources import Text, count_words, encoded, published_text, read_split_text
from tokendyn.experiments._text._streams import TokenStream, open_stream, training_windows, windows_per_epoch
from tokendyn.experiments._text._tokenizers import GPT2, Bytes, load_tokenizer
from tokendyn.experiments._text._wikitext import detokenize

PROSE = "The tokens move.\n\n Not all of them do;  some stay.\nÉtudes, α and 10 % more.\n" * 12


def stream_of(text: str, cache: Path) -> TokenStream:
    return encoded(Text("prose", [text]), Bytes(), cache)


@pytest.fixture
def bpe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two files of a small byte pair encoding, and a GPT2 that takes it."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([PROSE], vocab_size=300, show_progress=False)
    (tmp_path / "bpe").mkdir()
    trained.save_model(str(tmp_path / "bpe"))
    monkeypatch.setattr(GPT2, "vocab_size", trained.get_vocab_size())
    monkeypatch.setattr(GPT2, "end", trained.get_vocab_size() - 1)
    return tmp_path / "bpe"


def test_pieces_are_the_whole(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["tokens", "move", " ", "  ", "\n", "\n\n", "\n \n ", "é", "'s", "10", ";", "\t\n"]
    text = "".join(random.Random(7).choices(words, k=4000))
    tokenizer = load_tokenizer("gpt2", str(bpe))
    (whole,) = tokenizer.encode(text)
    assert tokenizer.decode(whole) == text
    for size in (1, 17, 400):
        monkeypatch.setattr(_tokenizers, "_PIECE", size)
        pieces = list(tokenizer.encode(text))
        assert len(pieces) > 5
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_bytes_are_utf8() -> None:
    (ids,) = Bytes().encode("α\n")
    np.testing.assert_array_equal(ids, [206, 177, 10])
    assert Bytes().decode(ids.tolist()) == "α\n"


def test_gpt2_without_its_files_is_told(tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="needs --tokenizer-dir"):
        load_tokenizer("gpt2", None)
    with pytest.raises(DataError, match=r"vocab\.json, .*merges\.txt missing"):
        load_tokenizer("gpt2", str(tmp_path))
    monkeypatch.setattr(GPT2, "vocab_size", 50_257)
    with pytest.raises(DataError, match=r"holds \d+ ids, GPT-2's holds 50257"):
        load_tokenizer("gpt2", str(bpe))
    (bpe / "merges.txt").write_text("#version: 0.2\nno-such\n")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer("gpt2", str(bpe))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        load_tokenizer("gpt2", str(bpe))


def test_a_stream_is_a_map_of_a_file_that_is_made_once(tmp_path: Path) -> None:
    stream = encoded(Text("two", [PROSE, "end"]), Bytes(), tmp_path)
    expected = np.frombuffer((PROSE + "\0end\0").encode(), np.uint8)
    np.testing.assert_array_equal(stream.ids, expected)
    assert isinstance(stream.ids, np.memmap)
    assert stream.header["text_bytes"] == len(expected) - 2
    assert stream.header["dtype"] == "uint8"
    assert len(pickle.dumps(stream)) < 2000
    written = (stream.folder / "tokens.bin").stat().st_mtime_ns
    assert encoded(Text("again", [PROSE, "end"]), Bytes(), tmp_path).fingerprint == stream.fingerprint
    assert (stream.folder / "tokens.bin").stat().st_mtime_ns == written
    with (stream.folder / "tokens.bin").open("ab") as file:
        file.write(b"x")  # no longer what the header says
    assert open_stream(stream.folder) is None
    np.testing.assert_array_equal(encoded(Text("mended", [PROSE, "end"]), Bytes(), tmp_path).ids, expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_ids_take_as_few_bytes_as_they_need(tmp_path: Path) -> None:
    for vocab_size, dtype in ((256, "uint8"), (257, "uint16"), (65_537, "uint32")):
        tokenizer: Any = SimpleNamespace(
            vocab_size=vocab_size, end=0, identity={"n": vocab_size}, encode=lambda text, top=vocab_size: [[0, top - 1]]
        )
        tokenizer.encode = lambda text, top=vocab_size: [np.array([0, top - 1])]
        stream = encoded(Text("t", ["x"]), tokenizer, tmp_path)
        assert stream.header["dtype"] == dtype
        assert stream.ids.tolist() == [0, vocab_size - 1, 0]
        tokenizer.identity = {"bad": vocab_size}
        tokenizer.encode = lambda text, top=vocab_size: [np.array([top])]
        with pytest.raises(DataError, match="lies outside"):
            encoded(Text("t", ["x"]), tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # nothing half written stays


def test_an_epoch_reads_every_window_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    stream = stream_of(PROSE, tmp_path)
    length, batch = 16, 4
    windows = windows_per_epoch(len(stream), length)
    steps = windows // batch
    seen = []
    for epoch in range(2):
        starts = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            rows = training_windows(stream, step, length=length, batch_size=batch, seed=5)
            assert rows.shape == (batch, length + 1)
            np.testing.assert_array_equal(rows, training_windows(stream, step, length=length, batch_size=batch, seed=5))
            starts += [bytes(row.astype(np.uint8)) for row in rows]
        seen.append(starts)
    text = stream.ids.tobytes()
    assert all(start in text for start in seen[0])
    assert seen[0] != seen[1]
    assert not np.array_equal(
        training_windows(stream, 0, length=length, batch_size=batch, seed=6),
        training_windows(stream, 0, length=length, batch_size=batch, seed=5),
    )


def test_windows_of_an_epoch_do_not_overlap(tmp_path: Path) -> None:
    numbers: Any = SimpleNamespace(
        vocab_size=1000, end=0, identity={"kind": "numbers"}, encode=lambda _: [np.arange(1, 1000)]
    )
    stream = encoded(Text("numbers", ["x"]), numbers, tmp_path)
    for seed in range(5):
        steps = windows_per_epoch(1000, 30) // 4
        first = [training_windows(stream, s, length=30, batch_size=4, seed=seed)[:, :-1] for s in range(steps)]
        ids = np.concatenate(first).ravel()
        assert len(np.unique(ids)) == len(ids) == steps * 4 * 30


def test_texts_are_found_in_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.raw").write_text("train text")
    (tmp_path / "README.md").write_text("no text")
    (tmp_path / "wiki_valid.txt.xz").write_bytes(lzma.compress("held out α".encode()))
    found = read_split_text(str(tmp_path), 0.1)
    assert {split: text.documents for split, text in found.items()} == {
        "train": ["train text"],
        "held_out": ["held out α"],
    }
    (tmp_path / "deep" / "train").mkdir(parents=True)
    (tmp_path / "deep" / "val").mkdir()
    for place, content in (("train/b.txt", "two"), ("train/a.txt", "one"), ("val/a.txt", "three")):
        (tmp_path / "deep" / place).write_text(content)
    (tmp_path / "deep" / "test.txt").write_text("four")
    found = read_split_text(str(tmp_path / "deep"), 0.1)
    assert [found[split].documents for split in ("train", "held_out", "test")] == [["one", "two"], ["three"], ["four"]]

    (tmp_path / "one.txt").write_text(PROSE)
    found = read_split_text(str(tmp_path / "one.txt"), 0.25)
    train, held_out = found["train"].documents[0], found["held_out"].documents[0]
    assert train + held_out == PROSE
    assert train.endswith("\n")
    assert abs(len(held_out) / len(PROSE) - 0.25) < 0.05


def test_the_text_of_the_package_is_there() -> None:
    found = read_split_text(None, 0.1)
    train, held_out = found["train"].documents[0], found["held_out"].documents[0]
    assert len((train + held_out).encode()) == 1_036_069
    assert "Temple Sinai" in train
    assert "\0" not in train + held_out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: place / "nowhere", "no such file or folder"),
        (lambda place: place, r"no text for train and held_out; .*\(bad.txt, line.txt is there\)"),
        (lambda place: place / "bad.txt", "cannot be read as UTF-8 text"),
        (lambda place: place / "line.txt", "is one line"),
        (lambda place: "hf:some/thing", "pip install datasets"),
    ],
)
def test_texts_that_cannot_be_had_are_told(
    make: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "line.txt").write_text("one line")
    with pytest.raises(DataError, match=words):
        read_split_text(str(make(tmp_path)), 0.1)


def test_hugging_face_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, configuration: str | None) -> dict[str, Any]:
        asked.append((path, configuration))
        return {"train": {"text": ["a\n", "b\n"]}, "validation": {"text": ["c"]}, "test": {"text": ["d"]}}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_split_text("hf:Salesforce/wikitext:wikitext-103-raw-v1", 0.1)
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
    assert [found[split].documents for split in ("train", "held_out", "test")] == [["a\nb\n"], ["c"], ["d"]]


@pytest.mark.parametrize(
    ("spaced", "wanted"),
    [
        (" = = Early life = = ", " == Early life =="),
        (" up to 5 @,@ 000 kg ( 11 @.@ 5 lb ) , and", " up to 5,000 kg (11.5 lb), and"),
        (' only " lobster red " on cooking .', ' only "lobster red" on cooking.'),
        (" the well @-@ known Boulter 's play ; he did n't", " the well-known Boulter's play; he didn't"),
        (" owners ' needs ( 50 % of them )", " owners' needs (50% of them)"),
        (" $ 5 and [ sic ] ", " $5 and [sic]"),
        (" 1 / 2 – 3 of it : yes ! ", " 1/2 – 3 of it: yes!"),
        ("", ""),
    ],
)
def test_spacing_of_wikitext_is_undone(spaced: str, wanted: str) -> None:
    assert detokenize(spaced) == wanted
    assert detokenize(detokenize(spaced)) == wanted


def test_words_are_counted_as_published(tmp_path: Path) -> None:
    raw = " = A = \n \n b , c . \n"
    assert count_words(raw) == 3 + 1 + 0 + 1 + 4 + 1
    (tmp_path / "wiki.test.raw").write_text(raw)
    text = published_text(tmp_path / "wiki.test.raw", wikitext=True)
    assert text.documents == [" = A =\n\n b, c.\n"] or text.documents == [" = A =\n \n b, c.\n"]
    stream = encoded(text, Bytes(), tmp_path / "cache")
    assert stream.header["words"] == 10
    assert open_stream(stream.folder).header["words"] == 8  # type: ignore[union-attr]


class Counting(torch.nn.Module):
    """-ln p of a byte: 1 + its place in the window, so that a score tells its context."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        return (1.0 + torch.arange(tokens.shape[1])).expand(tokens.shape)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("length", "stride"), [(10, 10), (10, 4), (10, 1), (1000, 7)])
def test_every_token_is_scored_once_after_the_context_promised(
    length: int, stride: int, batch_size: int, tmp_path: Path
) -> None:
    stream = stream_of("a b\nc " * 10, tmp_path)  # 60 bytes and the end
    found = perplexity(
        Counting(), stream, length=length, stride=stride, batch_size=batch_size, device=torch.device("cpu")
    )
    places = []
    for start in range(0, 60, stride):
        stop = min(start + stride, 60)
        begin = max(0, stop - length)
        places += [1 + place - begin for place in range(start, stop)]
    assert len(places) == 60
    assert found["loss"] == pytest.approx(np.mean(places))
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(places)))
    total = np.sum(places)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / 60 * 61 / 60)
    assert found["word_perplexity"] == pytest.approx(math.exp(min(700, total / stream.header["words"] * 61 / 60)))


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary(tmp_path: Path) -> None:
    stream = stream_of(PROSE, tmp_path)
    device = torch.device("cpu")

    def uniform(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.full(targets.shape, math.log(256))

    found = perplexity(uniform, stream, length=64, stride=64, batch_size=2, device=device, limit=200)  # type: ignore[arg-type]
    assert found["perplexity"] == pytest.approx(256)
    assert found["bits_per_byte"] == pytest.approx(8, rel=0.01)
    with pytest.raises(NonFiniteError, match="the loss on prose is nan"):
        perplexity(
            lambda tokens, targets: torch.full(targets.shape, math.nan),  # type: ignore[arg-type, return-value]
            stream,
            length=64,
            stride=64,
            batch_size=2,
            device=device,
        )
