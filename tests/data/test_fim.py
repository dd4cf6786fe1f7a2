"""Fill-in-the-middle against an independent one on strings; exact texts, supervision, places, and the same rows everywhere."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap.config import FimConfig
from megawrap.data.blend import Blend
from megawrap.data.fim import RESERVE, Fim
from megawrap.data.format import IndexedDataset
from megawrap.data.loader import Loader
from megawrap.data.packing import one_a_row, pack
from megawrap.data.rows import RowDataset
from megawrap.data.samples import select
from megawrap.data.tokenizer import Tokenizer
from megawrap.errors import EXIT_USAGE, DataError
from tests.data.fim_tokenizer import SANTACODER, STARCODER, write_fim_tokenizer, write_texts
from tests.tiny_tokenizer import END, PAD, TEXT, write_tokenizer

SEQ = 96
ALPHABET = "ab  \n\t(=.é—中🙂0123é<|>"


def texts(seed: int, number: int) -> list[tuple[str, str]]:
    """Random pairs, some of them without inputs, with characters of one to four bytes."""
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(rng.choice([rng.choice(ALPHABET), rng.choice(["def ", "return", "over the ", "print("])]) for _ in range(longest))

    return [(text(rng.randint(0, 9)), text(rng.randint(1, 20))) for _ in range(number)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_fim_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def rows_of(
    dataset: IndexedDataset, tokenizer: Tokenizer, settings: FimConfig | None, *, mode: str = "best_fit", reserve: int = RESERVE,
    **options: Any,
) -> RowDataset:  # fmt: skip
    span, loss_on = (0, dataset.num_documents), options.get("loss_on", "outputs")
    pieces = select(dataset, *span, seq_length=SEQ, overlong="truncate-inputs-left", loss_on=loss_on)
    packing = (pack if mode == "best_fit" else one_a_row)(pieces, SEQ, 3, reserve=reserve)
    fim = None if settings is None else Fim(settings, tokenizer, seed=7)
    return RowDataset(dataset, packing, seq_length=SEQ, seed=7, fim=fim, **options)


def segments_of(row: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every real segment as tokens x[0..n] and the weights of x[1..n]; its padding must be empty."""
    found, at = [], 0
    for number, (document, filled) in enumerate(zip(row["sample_ids"].tolist(), row["sample_lengths"].tolist(), strict=True)):
        place = int(row["segment_lengths"][number])
        inside, padding = slice(at, at + filled), slice(at + filled, at + place)
        assert not any(row[name][padding].any() for name in ("tokens", "labels", "weights"))
        assert row["tokens"][at + 1 : at + filled].tolist() == row["labels"][at : at + filled - 1].tolist()
        assert row["position_ids"][at : at + place].tolist() == list(range(place))
        tokens = [int(row["tokens"][at]), *row["labels"][inside].tolist()]
        found.append({"document": document, "tokens": tokens, "weights": row["weights"][inside].tolist()})
        at += place
    return found


def in_words(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens)


def put_back(text: str) -> str:
    """The text of a transformed one, by strings alone."""
    prefix_token, middle_token, suffix_token = STARCODER
    head, _, rest = text.partition(prefix_token)
    if rest.startswith(suffix_token):  # SPM
        suffix, _, prefix_and_middle = rest.removeprefix(suffix_token).partition(middle_token)
        return head + prefix_and_middle.removesuffix(END) + suffix + END * rest.endswith(END)
    prefix, _, rest = rest.partition(suffix_token)
    suffix, _, middle = rest.partition(middle_token)
    return head + prefix + middle.removesuffix(END) + suffix + END * middle.endswith(END)


def brute_force(tokenizer: Tokenizer, context: str, text: str, cuts: tuple[int, int], spm: bool) -> list[int]:
    """The published recipe on strings, one piece after another."""
    one, two = cuts

    def ids(piece: str) -> list[int]:
        return tokenizer.encode([piece], escape_special=True)[0].tolist()

    token = {name: tokenizer.special_tokens[name] for name in STARCODER}
    prefix, middle, suffix = ids(text[:one]), ids(text[one:two]), ids(text[two:])
    p, m, s = (token[name] for name in STARCODER)
    order = [p, s, *suffix, m, *prefix, *middle] if spm else [p, *prefix, s, *suffix, m, *middle]
    return [*ids(context), *order, tokenizer.eos_id]


def possible(tokenizer: Tokenizer, context: str, text: str, tokens: list[int], kind: str) -> bool:
    """Whether the tokens are those of some two cuts of the text in this order."""
    rest = in_words(tokenizer, tokens).removeprefix(context).removesuffix(END)
    suffix = rest.partition(STARCODER[2])[2].partition(STARCODER[1])[0]
    two = len(text) - len(suffix)
    return any(tokens == brute_force(tokenizer, context, text, (one, two), kind == "spm") for one in range(two + 1))


@pytest.mark.parametrize("mode", ["best_fit", "none"])
@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_transformed_samples_equal_a_brute_force_one(tmp_path: Path, tokenizer: Tokenizer, spm_rate: float, mode: str) -> None:
    pairs = texts(1, 100)
    dataset = write_texts(tmp_path / "d", tokenizer, pairs)
    rows = rows_of(dataset, tokenizer, FimConfig(rate=0.8, spm_rate=spm_rate), mode=mode)
    counted, kinds = np.zeros(3, dtype=int), Counter[str]()
    for index in range(len(rows)):
        row = rows.row(index, 2)
        counted += row["fim"]
        for segment in segments_of(row):
            context, text = pairs[segment["document"]]
            words = in_words(tokenizer, segment["tokens"])
            if STARCODER[0] not in words:
                kinds["kept"] += 1
                assert words == context + text + END
                continue
            assert put_back(words) == context + text + END
            found = [kind for kind in ("psm", "spm") if possible(tokenizer, context, text, segment["tokens"], kind)]
            assert found
            kinds["either" if len(found) == 2 else found[0]] += 1  # an empty prefix makes them the same
    assert counted.sum() == len(pairs) and counted[0] == kinds["spm"] + kinds["psm"] + kinds["either"] > 60
    assert counted[1] + counted[2] == kinds["kept"]
    assert (kinds["spm"] == 0) == (spm_rate == 0) and (kinds["psm"] == 0) == (spm_rate == 1)


def test_cuts_fall_anywhere_and_are_drawn_anew_in_every_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = write_texts(tmp_path / "d", tokenizer, [("", "abcdefghij")] * 200)
    rows = rows_of(dataset, tokenizer, FimConfig(rate=1, spm_rate=0), reserve=40)
    lengths, by_epoch = Counter[tuple[int, int]](), []
    for epoch in (0, 1):
        seen = {}
        for index in range(len(rows)):
            for segment in segments_of(rows.row(index, epoch)):
                words = in_words(tokenizer, segment["tokens"])
                prefix, _, rest = words.removeprefix(STARCODER[0]).partition(STARCODER[2])
                middle = rest.partition(STARCODER[1])[2].removesuffix(END)
                lengths[len(prefix), len(middle)] += 1
                seen[segment["document"]] = (len(prefix), len(middle))
        by_epoch.append(seen)
    assert len(by_epoch[0]) == 200 and sum(by_epoch[0][d] != by_epoch[1][d] for d in range(200)) > 150
    assert {prefix for prefix, _ in lengths} == set(range(11)) and {middle for _, middle in lengths} == set(range(11))


@pytest.mark.parametrize("loss_on", ["outputs", "all"])
@pytest.mark.parametrize("loss", ["all", "middle"])
@pytest.mark.parametrize("normalize", ["token", "target"])
def test_supervision_of_transformed_samples(tmp_path: Path, tokenizer: Tokenizer, loss: str, loss_on: str, normalize: str) -> None:
    pairs = texts(2, 80)
    dataset = write_texts(tmp_path / "d", tokenizer, pairs)
    settings = FimConfig(rate=1, loss=loss)  # type: ignore[arg-type]
    rows = rows_of(dataset, tokenizer, settings, loss_on=loss_on, normalize=normalize)
    transformed = 0
    for index in range(len(rows)):
        for segment in segments_of(rows.row(index)):
            context, _ = pairs[segment["document"]]
            tokens = segment["tokens"]
            num_context = len(tokenizer.encode([context], escape_special=True)[0])
            if tokenizer.special_tokens[STARCODER[0]] not in tokens:
                continue
            transformed += 1
            middle_token = tokens.index(tokenizer.special_tokens[STARCODER[1]])
            spm = tokens[num_context + 1] == tokenizer.special_tokens[STARCODER[2]]
            wanted = [loss_on == "all" or at >= num_context for at in range(len(tokens))]
            if loss == "middle":
                behind = len(tokens) - 1 - middle_token  # PREFIX and MIDDLE, or MIDDLE alone, and the end token
                supervised = sum(weight > 0 for weight in segment["weights"][max(num_context, 1) - 1 :])
                assert 1 <= supervised <= behind and (spm or supervised == behind)
                wanted = [*wanted[:num_context], *[False] * (len(tokens) - num_context - supervised), *[True] * supervised]
            runs, weights = Counter[int](), []
            run = 0
            for at, flag in enumerate(wanted[1:]):
                run += at > 0 and flag != wanted[at]
                runs[run] += 1
                weights.append((run, flag))
            expected = [flag / (runs[run] if normalize == "target" else 1) for run, flag in weights]
            assert segment["weights"] == pytest.approx(expected)
    assert transformed > 50


def test_spm_supervises_the_middle_behind_the_prefix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = write_texts(tmp_path / "d", tokenizer, [("", "0123456789" * 2)] * 40)
    rows = rows_of(dataset, tokenizer, FimConfig(rate=1, spm_rate=1, loss="middle"), reserve=40)
    for index in range(len(rows)):
        for segment in segments_of(rows.row(index)):
            tokens, weights = segment["tokens"], [0.0, *segment["weights"]]
            words = in_words(tokenizer, tokens)
            suffix, _, joined = words.removeprefix(STARCODER[0] + STARCODER[2]).partition(STARCODER[1])
            trained = in_words(tokenizer, [token for token, weight in zip(tokens, weights, strict=True) if weight])
            prefix = joined.removesuffix(trained)
            assert joined.endswith(trained) and trained.endswith(END)
            assert prefix + trained.removesuffix(END) + suffix == "0123456789" * 2


def test_plain_text_is_cut_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = texts(3, 60)
    rows = rows_of(write_texts(tmp_path / "d", tokenizer, pairs, modes=False), tokenizer, FimConfig(rate=1), loss_on="all")
    first = tokenizer.special_tokens[STARCODER[0]]
    found = [segment for index in range(len(rows)) for segment in segments_of(rows.row(index))]
    moved = [segment for segment in found if first in segment["tokens"]]
    assert len(moved) > 40 and all(segment["tokens"][0] == first for segment in moved)
    for segment in found:
        words = in_words(tokenizer, segment["tokens"])
        assert (put_back(words) if segment in moved else words) == "".join(pairs[segment["document"]]) + END
    cut_context = any(put_back(in_words(tokenizer, s["tokens"]))[:1] != in_words(tokenizer, s["tokens"][1:2])[:1] for s in moved)
    assert cut_context


def test_rate_zero_changes_no_byte(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = write_texts(tmp_path / "d", tokenizer, texts(4, 60))
    plain, none = rows_of(dataset, tokenizer, None, reserve=0), rows_of(dataset, tokenizer, FimConfig(rate=0.0), reserve=0)
    with pytest.raises(KeyError):  # without fill-in-the-middle nothing is reserved, and rows have no account of it
        _ = plain.row(0)["fim"]
    for index in range(len(plain)):
        one = plain.row(index)
        assert all(one[name].tobytes() == plain.row(index)[name].tobytes() for name in one)
    with_room = rows_of(dataset, tokenizer, FimConfig(rate=0.0))
    samples = {s["document"]: s for i in range(len(with_room)) for s in segments_of(with_room.row(i))}
    for index in range(len(plain)):
        row, at = plain.row(index), 0
        for document, length in zip(row["sample_ids"].tolist(), row["segment_lengths"].tolist(), strict=False):
            assert samples[document]["tokens"][:-1] == row["tokens"][at : at + length].tolist()
            assert samples[document]["weights"] == row["weights"][at : at + length].tolist()
            at += length
    assert none.packing.places(none.packing.length).tolist() == plain.packing.places(plain.packing.length).tolist()


def test_what_outgrows_its_place_stays_and_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = texts(5, 100)
    dataset = write_texts(tmp_path / "d", tokenizer, pairs)
    counted = {}
    for reserve in (0, 3, 4, RESERVE, 40):
        rows, counted[reserve] = rows_of(dataset, tokenizer, FimConfig(rate=1), reserve=reserve), np.zeros(3, dtype=int)
        for index in range(len(rows)):
            row = rows.row(index)
            counted[reserve] += row["fim"]
            for segment in segments_of(row):
                words, pair = in_words(tokenizer, segment["tokens"]), pairs[segment["document"]]
                assert (put_back(words) if STARCODER[0] in words else words) == "".join(pair) + END
    assert counted[0][0] == 0 and counted[0][2] > 90
    assert [counted[reserve][2] for reserve in counted] == sorted((counted[reserve][2] for reserve in counted), reverse=True)
    assert counted[40][2] <= 3 and all(counts.sum() == 100 for counts in counted.values())


def test_texts_that_cannot_be_cut_are_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = [("context", ""), ("", "x"), ("a" * 120, "short"), ("a", "b" * 200)]
    dataset = write_texts(tmp_path / "d", tokenizer, pairs)
    rows = rows_of(dataset, tokenizer, FimConfig(rate=1))
    kept = {}
    for index in range(len(rows)):
        for segment in segments_of(rows.row(index)):
            kept[segment["document"]] = STARCODER[0] not in in_words(tokenizer, segment["tokens"])
    assert kept == {0: True, 1: False, 2: True, 3: True}  # no text; fits; place at the end of a row; text itself is cut


def test_special_tokens_and_broken_bytes_are_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = write_texts(tmp_path / "d", tokenizer, [("", "abc")])
    fim = Fim(FimConfig(rate=1), tokenizer, seed=1)
    special = [*tokenizer.encode(["ab"], escape_special=True)[0].tolist(), tokenizer.special_tokens[STARCODER[1]]]
    broken = tokenizer.encode(["é"], escape_special=True)[0].tolist()[:1]
    spelled = tokenizer.encode(["<fim_prefix> \ufffd"], escape_special=True)[0].tolist()
    good = tokenizer.encode(["abc"], escape_special=True)[0].tolist()
    found = []
    sample = fim.text_of(dataset, np.array([*good, tokenizer.eos_id]), 0, 0)
    assert sample is not None and (sample.begin, sample.end) == (0, len(good))
    for ids in (special, broken, spelled, good):
        sample = replace(sample, tokens=np.array(ids), begin=0, end=len(ids))
        found.append(fim.rearrange([sample], np.array([0]), "f", 0)[0])
    assert [made is not None for made in found] == [False, False, True, True]


def test_a_begin_token_stays_in_front(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = write_texts(tmp_path / "d", tokenizer, [("", "abcdef")] * 9, begin=PAD)
    rows, whole = rows_of(dataset, tokenizer, FimConfig(rate=1)), 0
    for index in range(len(rows)):
        for segment in segments_of(rows.row(index)):
            words = in_words(tokenizer, segment["tokens"])
            assert words.startswith(PAD + STARCODER[0]) and put_back(words) == f"{PAD}abcdef{END}"
            whole += 1
    assert whole == 9


def sequence(order: Blend, dp_size: int, start: int, batches: int) -> list[tuple[Any, ...]]:
    loaders = [Loader(order, dp_rank=rank, dp_size=dp_size, micro_batch_size=1, global_batch_size=8) for rank in range(dp_size)]
    found = []
    for number in range(start, start + batches):
        by_rank = [loader.micro_batches(8 * number) for loader in loaders]
        found += [
            tuple(by_rank[rank][m][name].tobytes() for name in ("tokens", "labels", "weights", "fim"))
            for m in range(8 // dp_size) for rank in range(dp_size)
        ]  # fmt: skip
    return found


def test_the_same_rows_for_any_number_of_ranks_and_after_a_resume(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = write_texts(tmp_path / "d", tokenizer, texts(6, 120))

    def order() -> Blend:
        return Blend([rows_of(dataset, tokenizer, FimConfig(rate=0.5))], [1], seed=9)

    batches = 2 * len(order().sources[0]) // 8 + 2
    whole = sequence(order(), 1, 0, batches)
    for dp_size in (2, 4, 8):
        assert sequence(order(), dp_size, 0, batches) == whole
    assert sequence(order(), 2, 5, batches - 5) == whole[40:]
    assert len(set(whole)) > len(order().sources[0]), "another epoch draws other samples and other cuts"


def test_micro_batches_add_up_the_account(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = rows_of(write_texts(tmp_path / "d", tokenizer, texts(7, 50)), tokenizer, FimConfig(rate=0.5))
    loader = Loader(Blend([rows], [1], seed=9), dp_rank=0, dp_size=1, micro_batch_size=2, global_batch_size=4)
    for batch in loader.micro_batches(0):
        assert batch["fim"].sum() == len(batch["sample_ids"])
        assert batch["num_tokens"] == sum(len(s["tokens"]) - 1 for s in _segments_of_batch(batch, rows, loader))


def _segments_of_batch(batch: dict[str, Any], rows: RowDataset, loader: Loader) -> list[dict[str, Any]]:
    numbers = {tuple(row["sample_ids"].tolist()): row for row in loader.order.rows(np.arange(4))}
    mine = [row for ids, row in numbers.items() if set(ids) <= set(batch["sample_ids"].tolist())]
    return [segment for row in mine for segment in segments_of(row)]


def test_sentinels_are_found_or_refused(tmp_path: Path) -> None:
    for number, triple in enumerate((STARCODER, SANTACODER)):
        found = Tokenizer(write_fim_tokenizer(tmp_path / str(number), triple))
        fim = Fim(FimConfig(rate=1), found, seed=1)
        assert (fim.prefix_id, fim.middle_id, fim.suffix_id) == tuple(found.special_tokens[name] for name in triple)
        with pytest.raises(DataError, match=f"ids up to {found.vocab_size - 1}, the model knows 0 to {found.vocab_size - 2}"):
            Fim(FimConfig(rate=1), found, seed=1, vocab_size=found.vocab_size - 1)
    without = Tokenizer(write_tokenizer(tmp_path / "plain"))
    with pytest.raises(DataError) as caught:
        Fim(FimConfig(rate=1), without, seed=1, name="tok/plain")
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE
    assert "tok/plain has no fill-in-the-middle tokens" in message and all(name in message for name in (*STARCODER, *SANTACODER))


def test_a_tokenizer_that_changes_texts_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import normalizers

    directory = write_fim_tokenizer(tmp_path / "lower")
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(directory / "tokenizer.json"))
    text = TEXT[1]
    assert backend.decode(backend.encode(text).ids) != text
    dataset_tokenizer = Tokenizer(directory)
    backend.normalizer = normalizers.Strip()
    backend.save(str(directory / "tokenizer.json"))
    with pytest.raises(DataError, match="does not give back a text that is cut in two"):
        Fim(FimConfig(rate=1), Tokenizer(directory), seed=1)
    with pytest.raises(DataError, match="does not give back a text that is cut in two"):
        Fim(FimConfig(rate=1), dataset_tokenizer, seed=1)
