"""Instructions and chats as text, of which the model learns the responses alone.

A record with `instruction`, `input` (may be empty or missing) and `output` has the form of Stanford Alpaca and gets its prompts
(https://github.com/tatsu-lab/stanford_alpaca): ALPACA or ALPACA_INPUT below, then the output and the end of the document. A record
with `messages`, a list of {role, content}, is a chat. It becomes, message by message,

    <|system|>\\n{content}\\n        at most once, as the first
    <|user|>\\n{content}\\n
    <|assistant|>\\n{content}       then the tokenizer's end of the document

The markers are plain text, so that any tokenizer can write them. Prompts and responses are encoded apart from each other, so that a
token is of one or the other, and a prompt alone has the ids that it had in training.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moe_train.errors import UserError
from moe_train.finetune.records import Record, text_of

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
    """A prompt, or a response that is learned together with the end of the document after it."""

    text: str
    learned: bool


def parts_of(record: Record, where: str) -> list[Part]:
    """The prompts and responses of a record, the last one a response. Raises UserError naming the field that is wrong."""
    if "messages" in record:
        return list(_chat(record, where))
    return [Part(_prompt(record, where), False), Part(text_of(record, "output", where), True)]


def _prompt(record: Record, where: str) -> str:
    instruction = text_of(record, "instruction", where)
    if not instruction.strip():
        raise UserError(f"{where}: field 'instruction' is empty; write one, or remove the example")
    given = text_of(record, "input", where) if record.get("input") is not None else ""
    return ALPACA_INPUT.format(instruction=instruction, input=given) if given else ALPACA.format(instruction=instruction)


def _chat(record: Record, where: str) -> Iterator[Part]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: field 'messages' must be a list of objects with role and content")
    prompt = ""
    for number, message in enumerate(messages, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{here}: must be an object with role and content, not {type(message).__name__}")
        role = text_of(message, "role", here)
        if role not in ROLES:
            raise UserError(f"{here}: field 'role' is {role!r}; the roles are {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise UserError(f"{here}: field 'role' is 'system', which only the first message can be")
        content = text_of(message, "content", here)
        prompt += f"<|{role}|>\n"
        if role == "assistant":
            yield Part(prompt, False)
            yield Part(content, True)
            prompt = ""
        else:
            prompt += f"{content}\n"
    if prompt:
        raise UserError(f"{where}: the last message must be the assistant's; remove what follows its last one")
