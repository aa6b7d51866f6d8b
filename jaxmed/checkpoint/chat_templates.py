"""Our conversation templates as Jinja, for the folders that transformers and what is built on it read.

A message's content is a text, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`. The tokenizer adds the BOS.
"""

import json

from jaxmed.data.templates import TEMPLATES, Template

_CONTENT = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for item in content -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- elif item['type'] == 'text' -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


def chat_template(name: str) -> str:
    """The Jinja text of a template; "" for styles that are no chats."""
    template = TEMPLATES[name]
    write = {"two": _two, "llama_2": _llama_2, "mpt": _mpt}.get(template.style)
    return _CONTENT + write(template) if write else ""


def _text(text: str) -> str:
    """A Jinja expression of a text."""
    return json.dumps(text, ensure_ascii=False)


def _turns(opening: str, human: str, answer: str, prompt: str) -> str:
    """`human` and `answer`: Jinja for one message; `prompt`: what asks for an answer."""
    turns = (
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
        f"{human}{{%- elif message['role'] == 'assistant' -%}}{answer}{{%- endif -%}}{{%- endfor -%}}"
    )
    return f"{opening}{turns}{{%- if add_generation_prompt -%}}{prompt}{{%- endif -%}}"


def _show(*parts: str) -> str:
    return f"{{{{ {' + '.join(parts)} }}}}"


_SAID = "said(message['content'])"


def _two(template: Template) -> str:
    human, answer = template.roles
    return _turns(
        _show(_text(template.system + template.sep)),
        _show(_text(f"{human}: "), _SAID, _text(template.sep)),
        _show(_text(f"{answer}: "), _SAID, _text(template.sep2)),
        _show(_text(f"{answer}:")),
    )


def _llama_2(template: Template) -> str:
    begin = f"({_text('')} if loop.first else {_text(template.sep)})"
    system = f"({_text(f'<<SYS>>{chr(10)}{template.system}{chr(10)}<</SYS>>{chr(10) * 2}')} if loop.first else {_text('')})"
    inside = [system] if template.system else []
    return _turns(
        "",
        _show(begin, _text("[INST] "), *inside, _SAID, _text(" [/INST]")),
        _show(_text(" "), _SAID, _text(f" {template.sep2}")),
        "",
    )


def _mpt(template: Template) -> str:
    human, answer = template.roles
    opening = _show(_text(template.system + template.sep)) if template.system else ""
    return _turns(
        opening,
        _show(_text(human), _SAID, _text(template.sep)),
        _show(_text(answer), _SAID, _text(template.sep)),
        _show(_text(answer)),
    )
