"""Conversation templates as data, and how turns become one prompt string.

Five styles: `mpt` (role header + text + separator), `two` ("ROLE: text" with alternating separators), `llama_2`
([INST] brackets), `plain` (texts and a newline), `m3d` (a question behind placeholders, see jaxmed.data.placeholders). Every
character counts: a blank in the wrong place moves token borders, so oddities of the published strings (the ". " in llama3's
system text, double blanks) are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxmed.data.records import ROLES

_GUIDE = (
    "A chat between a curious {person} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)


@dataclass(frozen=True)
class Template:
    style: Literal["mpt", "two", "llama_2", "plain", "m3d"]
    """How turns are joined"""
    mask: Literal["llama3", "v1", "llama_2", "mpt", "plain", "m3d"]
    """Rule by which answers are supervised (jaxmed.data.masks)"""
    system: str
    roles: tuple[str, str]
    """Header of a human turn and of an answer"""
    sep: str
    """After a turn (`two`: after a human turn; `llama_2`: before one)"""
    sep2: str = ""
    """After an answer (`two`, `llama_2`)"""
    required: tuple[str, ...] = ()
    """Tokens that the tokenizer must hold whole, else masks cannot be aligned"""

    @property
    def end(self) -> str:
        """What closes an answer; "" for `plain`, whose answers end with a newline only, and for `m3d`: the end token."""
        return {"mpt": self.sep, "plain": "", "m3d": ""}.get(self.style, self.sep2)

    @property
    def keeps_special(self) -> bool:
        """Whether upstream printed the special tokens of an answer (BTB3D did; the others left them out)."""
        return self.mask == "llama3"


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _chatml(system: str) -> Template:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Template("mpt", "mpt", system, roles, "<|im_end|>", required=("<|im_start|>", "<|im_end|>"))


def _two(person: str) -> Template:
    return Template("two", "v1", _GUIDE.format(person=person), ("USER", "ASSISTANT"), " ", "</s>", ("</s>",))


def _inst(system: str, sep: str) -> Template:
    required = (sep, "</s>") if sep else ("</s>",)
    return Template("llama_2", "llama_2", system, ("USER", "ASSISTANT"), sep, "</s>", required)


_LLAMA3 = Template(
    "mpt",
    "llama3",
    f"<|begin_of_text|>{_header('system')}. {_GUIDE.format(person='user')} ",
    (_header("user"), _header("assistant")),
    "<|eot_id|>",
    required=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
_MINIMAL = Template(
    "mpt", "llama3", "", ("<|user|>", "<|assistant|>"), "<|end|>", required=("<|user|>", "<|assistant|>", "<|end|>")
)
_PLAIN = Template("plain", "plain", "", ("", ""), "\n")

TEMPLATES: dict[str, Template] = {
    "llama3": _LLAMA3,
    "v1": _two("user"),
    "vicuna_v1": _two("user"),
    "llava_v1": _two("human"),
    "llama_2": _inst(_LLAMA_2, "<s>"),
    "llava_llama_2": _inst(_LLAVA_LLAMA_2, "<s>"),
    "mistral_instruct": _inst("", ""),
    "chatml_direct": _chatml("<|im_start|>system\nAnswer the questions."),
    "mistral_direct": _chatml("<|im_start|>system\nAnswer the questions."),
    "mpt": _chatml(_MPT),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "minimal": _MINIMAL,
    "m3d": Template("m3d", "m3d", "", ("", ""), " ", required=("<im_patch>",)),
}


def _render_mpt(template: Template, turns: Sequence[tuple[str, str | None]]) -> str:
    # A template without a system text has no system block either (`minimal`; all published ones have a text).
    text = template.system + template.sep if template.system else ""
    for role, message in turns:
        header = template.roles[ROLES.index(role)]
        text += header + message + template.sep if message else header
    return text


def _render_two(template: Template, turns: Sequence[tuple[str, str | None]]) -> str:
    text = template.system + template.sep
    for index, (role, message) in enumerate(turns):
        header = template.roles[ROLES.index(role)] + ":"
        text += f"{header} {message}{template.sep2 if index % 2 else template.sep}" if message else header
    return text


def _render_llama_2(template: Template, turns: Sequence[tuple[str, str | None]]) -> str:
    text = ""
    for index, (_, message) in enumerate(turns):
        if index == 0 and template.system:
            message = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n{message or ''}"
        if message:
            text += f" {message} {template.sep2}" if index % 2 else f"{template.sep}[INST] {message} [/INST]"
    # The published code strips the *characters* of the separator on the left; the tokenizer adds the BOS itself.
    return text.lstrip(template.sep) if template.sep else text


def _render_plain(template: Template, turns: Sequence[tuple[str, str | None]]) -> str:
    return "".join(message + template.sep for _, message in turns if message)


def render(template: Template, turns: Sequence[tuple[str, str | None]]) -> str:
    """The prompt for (role, text) turns, roles `human` and `gpt`; text None or "" leaves the bare role header."""
    styles = {
        "mpt": _render_mpt,
        "two": _render_two,
        "llama_2": _render_llama_2,
        "plain": _render_plain,
        "m3d": lambda template, turns: template.sep.join(message for _, message in turns if message),
    }
    return styles[template.style](template, turns)
