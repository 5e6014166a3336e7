"""Chat templates: which one the output has, and where its files say so. They are copied, never rendered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..marked import Marked, meant

AUTO = "auto"


def read_chat_template(fields: Mapping[str, Marked]) -> str | None:
    """The setting in the fields of a document: `AUTO`, or the text of a template; None where it has none. Raises
    `RecipeError`."""
    if "chat_template" not in fields:
        return None
    at = fields["chat_template"]
    text = at.text()
    if text == AUTO or text in TEMPLATES:
        return TEMPLATES.get(text, AUTO)
    if len(text) < _SHORTEST or "{" not in text:
        known = meant(text, (AUTO, *TEMPLATES))
        raise at.error(f"{text[:40]!r} is neither the name nor the text of a chat template (Jinja){known}")
    return text


def chat_template(setting: str, models: Iterable[Mapping[str, bytes]]) -> str | None:
    """The template that a setting means, for models of these tokenizer files. `AUTO` is the one that most models have,
    but for space around it, and of equally many the first; None when no model has one."""
    if setting != AUTO:
        return setting
    found = [template for files in models if (template := template_in(files)) is not None]
    counts = Counter(template.strip() for template in found)
    return max(found, key=lambda template: counts[template.strip()], default=None)


def template_in(files: Mapping[str, bytes]) -> str | None:
    """The template that transformers finds in the files of a tokenizer; of several that have names, the default one."""
    if _FILE in files:
        return files[_FILE].decode(errors="replace")
    said = _object(files, _CONFIG).get(_KEY) or _object(files, _PROCESSORS).get(_KEY)
    if isinstance(said, list):
        named = {entry.get("name"): entry.get("template") for entry in said if isinstance(entry, dict)}
        said = named.get("default")
    return said if isinstance(said, str) and said else None


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files of a tokenizer with another template: in tokenizer_config.json where that alone has one, as every
    version of transformers reads it; else in chat_template.jinja, which processors read too and transformers writes."""
    config = _object(files, _CONFIG)
    inside = _KEY in config and _FILE not in files and _PROCESSORS not in files
    changed = {key: value for key, value in config.items() if key != _KEY} | ({_KEY: template} if inside else {})
    out = {name: data for name, data in files.items() if name not in (_FILE, _PROCESSORS)}
    if changed != config:
        out[_CONFIG] = json.dumps(changed, ensure_ascii=False, indent=2).encode() + b"\n"
    return out if inside else {**out, _FILE: template.encode()}


_KEY = "chat_template"
_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_PROCESSORS = "chat_template.json"  # where processors had theirs
_SHORTEST = 20  # characters of a template: no name of one is as long


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- formats that have a name ---

_ALPACA = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_EXAONE = """\
{%- if messages and messages[0].role != 'system' -%}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '[|' + message.role + '|]' + message.content + ('\\n' if message.role == 'user' else '[|endofturn|]\\n') }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '[|assistant|]' }}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content.strip() + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

_MISTRAL = """\
{{- bos_token -}}
{%- set pending = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set pending.system = message.content + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{ '[INST] ' + pending.system + message.content + ' [/INST]' }}
{%- set pending.system = '' -%}
{%- else -%}
{{ ' ' + message.content.strip() + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

#: What may be named instead of written out.
TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
