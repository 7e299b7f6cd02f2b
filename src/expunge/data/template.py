"""How a row becomes text: the tokenizer's chat template, a format string, or nothing at all."""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from expunge.data.example import Example
from expunge.errors import UserError
from expunge.recipe.conventions import EXPUNGE, Convention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: what `auto` means for a tokenizer without a chat template
PLAIN = "Question: {prompt}\nAnswer: {answer}"

#: Fixed values for what some chat templates read from the clock or from a switch: the same row must be the same
#: tokens tomorrow, and the answers here carry no reasoning before them.
CHAT_VARIABLES: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}

_PROBE_PROMPT, _PROBE_ANSWER = "qzxprompt", "qzxanswer"
_TRAILING_BLANKS = re.compile(r"[^\S\r\n]+$")

# Scripts that put no space between words or sentences (Hangul does, and is absent).
_UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x312F),  # CJK radicals and punctuation, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x9FFF),  # Bopomofo and Katakana extensions, CJK
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9DF),  # Javanese
    (0xF900, 0xFAFF),  # CJK compatibility
    (0xFF00, 0xFF9F),  # full-width forms, half-width Katakana
    (0x1B000, 0x1B16F),  # Kana supplement
    (0x20000, 0x3FFFF),  # CJK extensions
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row: `prompt` is given to the model, `answer` and `terminator` are to be said."""

    prompt: str
    answer: str
    terminator: str


class Template(ABC):
    """Renders rows. `terminator` is the text after every answer ("" if the tokenizer knows no end)."""

    name: str
    terminator: str
    #: the tokenizer's own prefix (BOS) goes in front, unless the text begins with it
    adds_prefix: bool = True
    #: EOS ends plain texts
    ends_texts: bool = True
    #: attention does not see tokens of the text that are the pad token
    hides_pad: bool = False

    @abstractmethod
    def texts(self, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """Prompt text and answer text of each row. Raises UserError where a row cannot be rendered."""

    def render(self, example: Example) -> Rendered:
        """The three texts of one row."""
        prompt, answer = self.texts([example])[0]
        return Rendered(prompt, answer, self.terminator)


@dataclass(frozen=True)
class RawTemplate(Template):
    """Prompt and answer as they stand, with one space between them where their script has one."""

    terminator: str
    name: str = "raw"
    joined: bool = False  # nothing between prompt and answer, and the prompt keeps its last blanks
    ends_texts: bool = True
    hides_pad: bool = False

    def texts(self, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """Prompt and answer; blanks at the prompt's end belong to the answer."""
        pairs = []
        for example in examples:
            prompt = "\n".join([*(content for _, content in example.turns), example.prompt])
            if self.joined:
                pairs.append((prompt, example.answer))
                continue
            gap = " " if needs_space(prompt, example.answer) else ""
            pairs.append(_hand_over_blanks(prompt, gap, example.answer))
        return pairs


@dataclass(frozen=True)
class FormatTemplate(Template):
    """A string with {prompt} and {answer}; what follows {answer} ends the answer instead of EOS."""

    name: str
    terminator: str
    before: tuple[str, ...]  # the text around each {prompt}, up to {answer}
    bos: str = ""  # stands once, however many turns fill the string
    ends_texts: bool = True
    hides_pad: bool = False

    def texts(self, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """The filled string, cut where the answer begins; braces in the data mean nothing."""
        return [_hand_over_blanks(self._prompt(example), "", example.answer) for example in examples]

    def _prompt(self, example: Example) -> str:
        """Earlier turns come first: a user turn and its answer fill the same string, another turn is a line."""
        parts: list[str] = []
        asked = False
        for role, content in (*example.turns, ("user", example.prompt)):
            if role == "user":
                filled = content.join(self.before)
                parts.append(filled.removeprefix(self.bos) if parts else filled)
            elif role == "assistant" and asked:
                parts[-1] += content
            else:
                parts.append(content)
            asked = role == "user"
        return "\n".join(parts)


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The tokenizer's chat template: what generation is given, and the end-of-turn token after the answer."""

    tokenizer: PreTrainedTokenizerBase
    terminator: str
    lead: str  # blanks that the template puts between its generation prompt and the answer
    name: str = "chat"
    adds_prefix: bool = False  # BOS is the template's own business
    tail: str = ""  # the terminator, and what the template writes behind it
    ends_texts: bool = True
    hides_pad: bool = False

    def texts(self, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """The generation prompt and the answer of each row."""
        conversations = [_conversation(example) for example in examples]
        try:
            prompts = _render_chat(self.tokenizer, conversations, prompt_only=True)
        except Exception as error:
            self._name_the_row(examples, conversations, error)
            raise
        return [
            (prompt, (self.lead if not example.answer[:1].isspace() else "") + example.answer)
            for prompt, example in zip(prompts, examples, strict=True)
        ]

    def _name_the_row(self, examples: Sequence[Example], conversations: list[Any], error: Exception) -> None:
        for example, conversation in zip(examples, conversations, strict=True):
            try:
                _render_chat(self.tokenizer, [conversation], prompt_only=True)
            except Exception as reason:
                roles = ", ".join(turn["role"] for turn in conversation)
                raise UserError(
                    f"{example.place}: the model's chat template refuses this conversation "
                    f"({roles}): {_one_line(reason)}",
                    "remove such turns, or use another template, for instance data.template=raw",
                ) from error


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase, convention: Convention = EXPUNGE) -> Template:
    """`auto`, `chat`, `raw` or a format string, made fit for one tokenizer, under a convention. Raises UserError."""
    return under(convention, _named_template(convention.template or name, tokenizer), tokenizer)


def under(convention: Convention, template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """A resolved template with the label span, the join and the mask of a convention."""
    changes: dict[str, Any] = {
        "terminator": _terminator(template, tokenizer.eos_token or "", convention),
        "ends_texts": convention.terminator != "none",
        "hides_pad": convention.masks_pad_tokens,
    }
    if isinstance(template, RawTemplate):
        changes["joined"] = convention.joined
    made: Any = template
    resolved: Template = replace(made, **changes)
    return resolved


def _terminator(template: Template, end: str, convention: Convention) -> str:
    """Text after every answer under a convention."""
    if convention.terminator == "none":
        return ""
    if convention.terminator == "eos":
        return end
    if convention.terminator == "template":
        return template.terminator
    whole = template.tail if isinstance(template, ChatTemplate) else template.terminator
    return whole if whole.endswith(end) else whole + end


def _named_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    end = tokenizer.eos_token or ""
    if name == "auto":
        name = "chat" if tokenizer.chat_template else PLAIN
    if name == "chat":
        return _chat_template(tokenizer, end)
    if name == "raw":
        return RawTemplate(terminator=end)
    return _format_template(name, tokenizer, end)


def needs_space(prompt: str, answer: str) -> bool:
    """Whether running text has a space between `prompt` and `answer`."""
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return False
    return not (_unspaced(prompt[-1]) or _unspaced(answer[0]) or _clings(answer[0]))


def _chat_template(tokenizer: PreTrainedTokenizerBase, end: str) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise UserError(
            "template 'chat': the model's tokenizer has no chat template",
            f"use data.template=auto, raw, or a format string such as {PLAIN!r}",
        )
    asked = [{"role": "user", "content": _PROBE_PROMPT}]
    answered = [*asked, {"role": "assistant", "content": _PROBE_ANSWER}]
    try:
        prompt = _render_chat(tokenizer, [asked], prompt_only=True)[0]
        whole = _render_chat(tokenizer, [answered], prompt_only=False)[0]
    except Exception as error:
        raise UserError(
            f"the model's chat template cannot be used: {_one_line(error)}", "use another, such as data.template=raw"
        ) from error
    if whole.count(_PROBE_ANSWER) != 1:
        raise UserError(
            "the model's chat template does not show the assistant's answer", "use another, such as data.template=raw"
        )
    head, _, tail = whole.partition(_PROBE_ANSWER)
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    if _TRAILING_BLANKS.fullmatch(lead) is None:
        lead = ""
    return ChatTemplate(tokenizer=tokenizer, terminator=tail.strip() or end, lead=lead, tail=tail)


def _format_template(name: str, tokenizer: PreTrainedTokenizerBase, end: str) -> FormatTemplate:
    # A shell passes \n as two characters; nobody wants them in a prompt.
    text = name.replace("\\n", "\n").replace("\\t", "\t")
    before, answer, after = text.partition("{answer}")
    if not answer or "{prompt}" not in before or "{answer}" in after or "{prompt}" in after:
        raise UserError(
            f"template {name!r} must contain {{prompt}} and then, once, {{answer}}",
            f"auto, chat, raw, or a format string such as {PLAIN!r}",
        )
    return FormatTemplate(name, after.rstrip() or end, tuple(before.split("{prompt}")), tokenizer.bos_token or "")


def _render_chat(tokenizer: PreTrainedTokenizerBase, conversations: list[Any], *, prompt_only: bool) -> list[str]:
    rendered: list[str] = tokenizer.apply_chat_template(
        conversations, tokenize=False, add_generation_prompt=prompt_only, **CHAT_VARIABLES
    )
    return rendered


def _conversation(example: Example) -> list[dict[str, str]]:
    turns = [{"role": role, "content": content} for role, content in example.turns]
    return [*turns, {"role": "user", "content": example.prompt}]


def _hand_over_blanks(prompt: str, gap: str, answer: str) -> tuple[str, str]:
    """Blanks at the prompt's end go to the answer: in training text the space belongs to the word after it."""
    bare = _TRAILING_BLANKS.sub("", prompt)
    gap = prompt[len(bare) :] + gap
    return bare, answer if answer[:1].isspace() else gap + answer


def _unspaced(char: str) -> bool:
    code = ord(char)
    return any(first <= code <= last for first, last in _UNSPACED)


def _clings(char: str) -> bool:
    """Punctuation that stands without a space after the word before it."""
    return char in ".,;:!?%'’…‥·" or unicodedata.category(char) in ("Pe", "Pf")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
