"""Conversations against transformers' own rendering and its mask of assistant tokens, and the templates that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megawrap.data.build import Encoder, Options
from megawrap.data.chat import ChatTemplate, ChatTexts
from megawrap.data.fields import Batch, Sequences
from megawrap.data.jsonl import LineError
from megawrap.data.tokenizer import Tokenizer
from megawrap.errors import DataError
from tests.tiny_tokenizer import END, write_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|pad|>' + message['role'] + '\n' + message['content'] + '<|endoftext|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|pad|>assistant\n' }}{% endif %}"
)
# The same with the blocks that transformers makes its mask of.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|pad|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|endoftext|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|pad|>' + message['role'] + '\n' + message['content'] + '<|endoftext|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|pad|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # drops what was thought in earlier turns, as reasoning models do
    "{% for m in messages %}{{ '<|pad|>' + m['role'] + '\n' }}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|pad|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "add 1 and 2"},
    {"role": "assistant", "content": "return 3"},
    {"role": "user", "content": "  and\nnow?"},
    {"role": "assistant", "content": "the quick brown fox\n\nprint(i)"},
]


def tokenizer_with(tmp_path: Path, template: str | None, **config: Any) -> Path:
    config = {"eos_token": END, "bos_token": "<|pad|>", **({} if template is None else {"chat_template": template}), **config}
    return write_tokenizer(tmp_path / "tokenizer", config=config)


def sequences(directory: Path, messages: list[Any], policy: str = "escape", **more: Any) -> Sequences:
    tokenizer = Tokenizer(directory)
    return ChatTexts(ChatTemplate.of(tokenizer), tokenizer.special_text, policy).pick({"messages": messages, **more})


def oracle(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    config = json.loads((directory / "tokenizer_config.json").read_text())
    made = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), eos_token=END, bos_token=config["bos_token"])
    made.chat_template = config["chat_template"]
    return made


@pytest.mark.parametrize("template", [CHATML, MARKED, PLAIN, LLAMA2], ids=["chatml", "marked", "plain", "llama2"])
@pytest.mark.parametrize("messages", [TURNS[1:], TURNS[1:3], TURNS[1:4]], ids=["two turns", "one turn", "ends with user"])
def test_text_is_transformers_own(tmp_path: Path, template: str, messages: list[Any]) -> None:
    directory = tokenizer_with(tmp_path, template)
    found = sequences(directory, messages)
    assert "".join(found.texts) == oracle(directory).apply_chat_template(messages, tokenize=False)
    trained = [text for text, flag in zip(found.texts, found.trained, strict=True) if flag]
    assert len(trained) == sum(message["role"] == "assistant" for message in messages)
    for text, message in zip(trained, [message for message in messages if message["role"] == "assistant"], strict=True):
        end = {CHATML: END, MARKED: END, PLAIN: "\n", LLAMA2: f" {END}"}[template]
        assert text == (" " if template == LLAMA2 else "") + message["content"] + end


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by rendering", "by generation blocks"])
def test_trained_tokens_are_those_of_transformers_mask(tmp_path: Path, template: str) -> None:
    directory = tokenizer_with(tmp_path, template)
    theirs = oracle(directory)
    theirs.chat_template = MARKED
    encoded = theirs.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    tokenizer = Tokenizer(directory)
    found = sequences(directory, TURNS)
    block, _ = Encoder(tokenizer, Options(fields=("messages",))).encode(Batch.of([found], [1], lambda text: False))
    assert block.tokens.tolist() == encoded["input_ids"]
    mask = [flag for flag, length in zip(block.modes.tolist(), block.lengths.tolist(), strict=True) for _ in range(length)]  # type: ignore[union-attr]
    assert mask == encoded["assistant_masks"]
    assert block.lengths.sum() == len(encoded["input_ids"])  # no second end token behind the template's own
    assert block.sequences_per_document.tolist() == [len(found.texts)] == [5]


def test_end_token_where_the_template_has_none(tmp_path: Path) -> None:
    directory = tokenizer_with(tmp_path, PLAIN)
    tokenizer = Tokenizer(directory)
    batch = Batch.of([sequences(directory, TURNS[1:])], [1], lambda text: False)
    block, _ = Encoder(tokenizer, Options(fields=("messages",))).encode(batch)
    assert block.tokens[-1] == tokenizer.eos_id
    assert (block.tokens == tokenizer.eos_id).sum() == 1
    assert block.modes is not None
    assert block.modes.tolist() == [0, 1, 0, 1]


def test_an_assistant_that_speaks_first(tmp_path: Path) -> None:
    found = sequences(tokenizer_with(tmp_path, CHATML), [{"role": "assistant", "content": "hello"}, *TURNS[1:3]])
    assert [text for text, flag in zip(found.texts, found.trained, strict=True) if flag] == [f"hello{END}", f"return 3{END}"]


def test_a_conversation_without_an_answer_trains_nothing(tmp_path: Path) -> None:
    directory = tokenizer_with(tmp_path, CHATML)
    assert not any(sequences(directory, TURNS[:2]).trained)
    assert not any(sequences(directory, [TURNS[1], {"role": "assistant", "content": "  "}]).trained)


def test_what_cannot_be_found_exactly_is_refused(tmp_path: Path) -> None:
    directory = tokenizer_with(tmp_path, FORGETFUL)
    thinking = [TURNS[1], {"role": "assistant", "content": "<think>hm</think>3"}]
    assert sequences(directory, thinking).trained == (False, True, False)
    with pytest.raises(LineError, match="message 2 cannot be found: the template renders it differently") as refused:
        sequences(directory, [*thinking, *TURNS[3:]])
    assert refused.value.reason == "assistant-span"
    directory = tokenizer_with(tmp_path, "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(LineError, match="message 2 is not in the rendered text as it was written"):
        sequences(directory, TURNS[1:3])


BAD: dict[str, tuple[Any, str, str]] = {
    "not a list": ("hello", "wrong-type", "'messages' is a string, it must be a list of messages"),
    "empty": ([], "wrong-type", "an empty list"),
    "no role": ([{"content": "a"}], "wrong-type", "message 1 is not an object with a role"),
    "content is a number": ([TURNS[1], {"role": "assistant", "content": 3}], "wrong-type", "content of message 2 is a number"),
    "refused by the template": ([{"role": "robot", "content": "a"}], "chat-template", "refuses the messages: no robots"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations(tmp_path: Path, name: str) -> None:
    messages, reason, fact = BAD[name]
    template = "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}{% endfor %}" + CHATML
    with pytest.raises(LineError, match=fact) as refused:
        sequences(tokenizer_with(tmp_path, template), messages)
    assert refused.value.reason == reason
    with pytest.raises(LineError, match="no key 'messages'"):
        tokenizer = Tokenizer(tmp_path / "tokenizer")
        ChatTexts(ChatTemplate.of(tokenizer), tokenizer.special_text, "escape").pick({"message": []})


def test_special_tokens_written_by_a_user(tmp_path: Path) -> None:
    """A user must not be able to end a turn: only the template's own special tokens become tokens."""
    directory = tokenizer_with(tmp_path, CHATML)
    messages = [{"role": "user", "content": f"say {END} now"}, {"role": "assistant", "content": "ok"}]
    tokenizer = Tokenizer(directory)
    with pytest.raises(LineError, match="spelled out in a message"):
        sequences(directory, messages, "error")
    for policy, ends in (("escape", 2), ("allow", 3)):
        found = sequences(directory, messages, policy)
        assert found.special
        assert "".join(found.texts) == oracle(directory).apply_chat_template(messages, tokenize=False)
        options = Options(fields=("messages",), special_tokens_in_text=policy)  # type: ignore[arg-type]
        block, _ = Encoder(tokenizer, options).encode(Batch.of([found, sequences(directory, TURNS, policy)], [1, 2], lambda text: False))
        assert int((block.tokens[: block.lengths[:3].sum()] == tokenizer.eos_id).sum()) == ends
        assert block.sequences_per_document.tolist() == [3, 5]
        assert tokenizer.decode(block.tokens[: block.lengths[:3].sum()].tolist()) == "".join(found.texts)
    trimming = tokenizer_with(tmp_path, CHATML.replace("message['content']", "message['content'][:10]"))
    with pytest.raises(LineError, match="changes a message that spells out"):
        sequences(trimming, [{"role": "user", "content": f"say {END} now" * 3}, messages[1]])


def test_r12_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attacks = [
        f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{canary}",
        f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
        f"{{{{ self.__init__.__globals__.__builtins__.open('{canary}', 'w') }}}}",
        "{{ messages.append({}) }}",
    ]
    for attack in attacks:
        with pytest.raises((DataError, LineError)):
            sequences(tokenizer_with(tmp_path, attack), TURNS)
    assert not canary.exists()


def test_where_templates_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template"):
        ChatTemplate.of(Tokenizer(tokenizer_with(tmp_path, None)))
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    directory = tokenizer_with(tmp_path, None, chat_template=several)
    assert ChatTemplate.of(Tokenizer(directory)).render(TURNS[:1]) == f"<|pad|>system\nbe brief{END}\n"
    (directory / "chat_template.jinja").write_text("jinja")
    assert ChatTemplate.of(Tokenizer(directory)).render(TURNS) == "jinja"
    (directory / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"chat_template\.jinja: the chat template cannot be compiled"):
        ChatTemplate.of(Tokenizer(directory))
