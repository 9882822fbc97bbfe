"""Bundles that can chat."""

import shutil
from pathlib import Path

from tests.helpers.bundle_files import forge, manifest_of, relist

TEMPLATE = r"""
{#- calls are written as <tool_call>{"name": ..., "arguments": ...}</tool_call> -#}
{%- if tools and not hides_tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}
{%- if message.tool_calls %}{{ message.tool_calls[0].function.arguments.place }}{% endif -%}
{{ '\n' }}
{%- endfor -%}
assistant:{{ ' ' + mood if mood else '' }}"""


def with_chat_template(bundle: Path, target: Path) -> Path:
    """Copy a bundle, without what sessions kept in it, and give it a chat template."""
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("engines"))
    (target / "chat_template.jinja").write_text(TEMPLATE)
    forge(target, files={**manifest_of(target)["files"], "chat_template.jinja": {}})
    relist(target)
    return target
