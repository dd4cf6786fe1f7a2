"""Peers of the training benchmark: Hugging Face Trainer, a packed loop over transformers, and TRL's SFTTrainer.

In: the worker's spec (model, rows, seq_length, device, dtype) and its `Port`. Each peer is set up as its own documentation
says, with fused AdamW, clipping at 1, dropout 0 and no cache; bf16 is autocast over fp32 weights, as Trainer's bf16=True.
Work is counted alike for all: predictions (tokens with a next token in their sample), targets, squared lengths.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.models import hugging_face
from benchmarks.samples import Sample, draw
from benchmarks.worker import Port

IGNORED = -100  # label of positions that are not trained, in transformers
NUM_SAMPLES = 2048


def samples(spec: dict[str, Any]) -> list[Sample]:
    """The samples of this run, at most a row long."""
    return draw(NUM_SAMPLES, vocab_size=spec["model"]["vocab_size"], longest=spec["seq_length"])


def work_of(lengths: Sequence[int], targets: int) -> dict[str, float]:
    """What a step did, from the token lengths of its samples and its trained labels."""
    predictions = [length - 1 for length in lengths]
    return {"tokens": sum(predictions), "targets": targets, "squared": sum(n * n for n in predictions)}


def labels(sample: Sample) -> Any:
    """Token ids where trained, IGNORED elsewhere; transformers shifts them itself."""
    made = sample.tokens.copy()
    made[: sample.num_inputs] = IGNORED
    return made


def trainer(spec: dict[str, Any], port: Port) -> None:
    """transformers.Trainer on padded batches, with its defaults or as spec says (bf16, group_by_length, batch)."""
    import torch
    from transformers import Trainer, TrainingArguments

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        columns = {name: [torch.as_tensor(example[name]) for example in batch] for name in ("input_ids", "labels")}
        return {
            "input_ids": pad(columns["input_ids"], batch_first=True, padding_value=0),
            "labels": pad(columns["labels"], batch_first=True, padding_value=IGNORED),
            "attention_mask": pad([torch.ones_like(ids) for ids in columns["input_ids"]], batch_first=True),
        }

    def work(inputs: dict[str, Any]) -> dict[str, float]:
        return work_of(inputs["attention_mask"].sum(1).tolist(), int((inputs["labels"] != IGNORED).sum()))

    dataset = [{"input_ids": sample.tokens, "labels": labels(sample)} for sample in samples(spec)]
    arguments = TrainingArguments(**_arguments(spec))
    _serve(_counting(Trainer, work)(model=hugging_face(spec["model"]), args=arguments, data_collator=collate, train_dataset=dataset), port)


def trl_packing(spec: dict[str, Any], port: Port) -> None:
    """TRL's SFTTrainer with packing=True (best-fit decreasing, padding-free); flash attention on CUDA where it is installed."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    flash = spec["device"] == "cuda" and is_flash_attn_2_available()
    model = hugging_face(spec["model"], **({"attn_implementation": "flash_attention_2", "dtype": torch.bfloat16} if flash else {}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0}, unk_token="x")), pad_token="x", eos_token="x")
    columns = {
        "input_ids": [sample.tokens.tolist() for sample in samples(spec)],
        "labels": [labels(sample).tolist() for sample in samples(spec)],
    }
    config = SFTConfig(**_arguments(spec), packing=True, max_length=spec["seq_length"], gradient_checkpointing=False)

    def work(inputs: dict[str, Any]) -> dict[str, float]:
        starts = torch.nonzero(inputs["position_ids"].flatten() == 0).flatten().tolist()
        borders = [*starts, inputs["position_ids"].numel()]
        lengths = [end - start for start, end in itertools.pairwise(borders)]
        return work_of(lengths, int((inputs["labels"] != IGNORED).sum()))

    peer = _counting(SFTTrainer, work)(model=model, args=config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    _serve(peer, port, flash_attention=flash)


def packed(spec: dict[str, Any], port: Port) -> None:
    """A plain loop over transformers on packed rows; restarting position ids isolate samples (needs use_cache=False)."""
    import torch

    device, bf16 = spec["device"], spec["dtype"] == "bf16"
    model = hugging_face(spec["model"], attn_implementation="sdpa").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = itertools.cycle(list(_packed_batches(samples(spec), spec["rows"], spec["seq_length"])))
    port.ready(parameters=sum(p.numel() for p in model.parameters()))
    while True:
        arrays, work = next(batches)
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        port.did(**work)


def _packed_batches(drawn: Sequence[Sample], rows: int, seq_length: int) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Batches [rows, seq_length] of first-fit rows; tail padding is a segment of its own."""
    import numpy as np

    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(drawn, key=lambda sample: -len(sample.tokens)):
        place = next((i for i, free in enumerate(room) if free >= len(sample.tokens)), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(seq_length)
        bins[place].append(sample)
        room[place] -= len(sample.tokens)
    order = np.random.default_rng(0).permutation(len(bins))
    for first in range(0, len(order) - rows + 1, rows):
        arrays = {name: np.zeros((rows, seq_length), np.int64) for name in ("input_ids", "labels", "position_ids")}
        arrays["labels"][:] = IGNORED
        packed_samples = []
        for row, place in enumerate(order[first : first + rows]):
            at = 0
            for sample in bins[place]:
                end = at + len(sample.tokens)
                arrays["input_ids"][row, at:end], arrays["labels"][row, at:end] = sample.tokens, labels(sample)
                arrays["position_ids"][row, at:end] = np.arange(end - at)
                at = end
                packed_samples.append(sample)
            arrays["position_ids"][row, at:] = np.arange(seq_length - at)
        yield arrays, work_of([len(sample.tokens) for sample in packed_samples], sum(sample.targets for sample in packed_samples))


def _arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """TrainingArguments: the defaults, but for what stops a run from being measured alone (logging, saving, progress)."""
    chosen: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="megawrap-benchmark-"), "max_steps": 10**6, "per_device_train_batch_size": spec["rows"],
        "use_cpu": spec["device"] == "cpu", "bf16": spec["dtype"] == "bf16", "learning_rate": 1e-5, "logging_strategy": "no",
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": spec["device"] != "cpu",
    }  # fmt: skip
    if spec.get("group_by_length"):
        chosen["train_sampling_strategy"] = "group_by_length"
    return chosen


def _counting(base: Any, work: Any) -> Any:
    """A Trainer class that notes the work of each step."""

    class Counting(base):
        done: dict[str, float]

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.done = work(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    return Counting


def _serve(peer: Any, port: Port, **facts: Any) -> None:
    """Run a Trainer, waiting for the driver between windows."""
    from transformers import TrainerCallback

    class Window(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            port.ready(parameters=sum(p.numel() for p in peer.model.parameters()), **facts)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            port.did(**peer.done)

    peer.add_callback(Window())
    peer.train()
