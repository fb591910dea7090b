"""Tasks whose answer is written: sequence to sequence, and causal language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flix.core.errors import shown
from flix.data import forms
from flix.tasks import columns as reading
from flix.tasks.columns import Row
from flix.tasks.errors import DataError
from flix.tasks.task import IGNORED, Encoded, Task

_REACH = 3  # tokens


@dataclass(frozen=True)
class Written(Task):
    """A task whose answer is text that the model writes."""

    generates = True

    @property
    def metric(self) -> str:
        """Exact match."""
        return "exact_match"

    def example(self, row: Row) -> tuple[str, str | None]:
        """The source, or the prompt where rows have no source column; and the target."""
        has = row.get(self.columns["source"]) is not None
        source = self.text(row, "source") if has else self.asked(row)
        return source, self.text(row, "target") if self.answered(row) else None

    def unknown(self, text: str) -> tuple[int, int]:
        """How many of a text's tokens the tokenizer has no token for, and how many there are."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids.count(self.tokenizer.unk_token_id), len(ids)


@dataclass(frozen=True)
class Seq2Seq(Written):
    """An encoder reads the prompt, a decoder writes the target; both are cut at their ends."""

    kind = "seq2seq"

    def read(self, row: Row) -> Encoded:
        """``input_ids`` and ``labels``, each with its end mark."""
        wanted = self.text(row, "target")
        ids = self._cut(list(self.tokenizer(text_target=wanted)["input_ids"]), self.max_target)
        return {**self.prompt(row), "labels": self.known(ids, wanted)}

    def prompt(self, row: Row) -> Encoded:
        """``input_ids`` with the end mark."""
        asked = self.asked(row)
        ids = self._cut(list(self.tokenizer(asked)["input_ids"]), self.max_source)
        return {"input_ids": self.known(ids or [self.pad], asked)}

    def _cut(self, ids: list[int], longest: int) -> list[int]:
        if len(ids) <= longest:
            return ids
        tail = [ids[-1]] if ids[-1] == self.end else []
        return ids[: longest - len(tail)] + tail


@dataclass(frozen=True)
class Causal(Written):
    """A decoder reads the prompt and goes on with the target and the end mark, which alone count for the loss.

    The prompt comes without the end mark that some tokenizers put there. It is cut at its start, the target at its end.
    """

    kind = "causal"

    def read(self, row: Row) -> Encoded:
        """``input_ids`` of prompt and target, and ``labels``, which the prompt has none of."""
        wanted = self.text(row, "target")
        ids = list(self.tokenizer(wanted, add_special_tokens=False)["input_ids"])
        ids = ids[: self.max_target - 1] + ([self.end] if self.end is not None else [])
        before = self.prompt(row)["input_ids"]
        return {
            "input_ids": before + self.known(ids, wanted),
            "labels": [IGNORED] * len(before) + ids,
        }

    def prompt(self, row: Row) -> Encoded:
        """``input_ids`` without an end mark."""
        asked = self.asked(row)
        ids = list(self.tokenizer(asked)["input_ids"])
        if ids and ids[-1] == self.end:
            ids.pop()
        ids = self.shortened(ids, self.max_source)
        return {"input_ids": self.known(ids or [self.pad], asked)}

    def shortened(self, ids: list[int], longest: int) -> list[int]:
        """Ids cut at their start, after the mark of the beginning."""
        if len(ids) <= longest:
            return ids
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return begin + ids[len(ids) - longest + len(begin) :]


@dataclass(frozen=True)
class Chat(Causal):
    """Conversations in a column of messages, through the tokenizer's chat template.

    Every turn of the assistant is learned, all else counts for no loss. A conversation longer than source and target
    together is cut at its start. To answer, the model goes on before the last turn of the assistant.
    """

    @property
    def answer_column(self) -> str:
        """The conversation; its last turn is the answer if it is the assistant's."""
        return self.columns["messages"]

    def answered(self, row: Row) -> bool:
        """Whether the conversation ends with a turn of the assistant."""
        return bool(self._messages(row)[-1]["role"] == "assistant")

    def read(self, row: Row) -> Encoded:
        """``input_ids`` of the conversation, and ``labels`` in the assistant's turns."""
        talk, where = self._messages(row), self.place(row)
        whole = self._render(talk, where)
        ids = self._tokens(whole)
        labels = [IGNORED] * len(ids)
        turns = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{where}: the conversation has no turn of the assistant to learn")
        for turn in turns:
            ends = []
            for part, opened in ((talk[:turn], True), (talk[: turn + 1], False)):
                until = self._render(part, where, opened) if part or opened else ""
                if not whole.startswith(until):
                    raise DataError(
                        f"{where}: the chat template writes a conversation differently once it goes on (message {turn}), "
                        "so what the assistant says cannot be told from the rest; give one conversation a row for each "
                        "of the assistant's turns, or another template"
                    )
                ends.append(self._end_of(ids, until, where))
            labels[ends[0] : ends[1]] = ids[ends[0] : ends[1]]
        longest = self.max_source + self.max_target
        kept = len(ids) - len(self.shortened(ids, longest))
        self.known(ids, whole)
        begin = len(ids) > longest and ids[0] == self.tokenizer.bos_token_id
        first = [IGNORED] if begin else []
        return {
            "input_ids": self.shortened(ids, longest),
            "labels": first + labels[kept + len(first) :],
        }

    def prompt(self, row: Row) -> Encoded:
        """``input_ids`` up to where the assistant answers."""
        talk = self._messages(row)
        asked = self._render(talk[:-1] if self.answered(row) else talk, self.place(row), True)
        ids = self.shortened(self._tokens(asked), self.max_source)
        return {"input_ids": self.known(ids or [self.pad], asked)}

    def example(self, row: Row) -> tuple[str, str | None]:
        """The conversation, a line a message, and the assistant's last turn."""
        talk = self._messages(row)
        last = talk.pop()["content"] if self.answered(row) else None
        return "\n".join(f"{m['role']}: {m['content']}" for m in talk), last

    def _messages(self, row: Row) -> list[dict[str, str]]:
        column, where = self.columns["messages"], self.place(row)
        return forms.messages(reading.value_of(row, column, where), column, where)

    def _render(self, talk: list[dict[str, str]], where: str, opened: bool = False) -> str:
        try:
            found: Any = self.tokenizer.apply_chat_template(
                talk, tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # what a template raises is its own
            raise DataError(
                f"{where}: the chat template refuses the conversation: {shown(str(error))}"
            ) from error
        return str(found)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end_of(self, ids: list[int], until: str, where: str) -> int:
        """How many of a conversation's ids its beginning has; a token may reach over the end of it."""
        part = self._tokens(until)
        length = next(
            (i for i, (a, b) in enumerate(zip(ids, part, strict=False)) if a != b), len(part)
        )
        if len(part) - length > _REACH:
            raise DataError(
                f"{where}: the tokenizer reads the beginning of a conversation differently once "
                f"it goes on, so what the "
                "assistant says cannot be told from the rest"
            )
        return length
