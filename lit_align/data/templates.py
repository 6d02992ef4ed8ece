"""Chat templates for tokenizers that have none."""

from __future__ import annotations

from pathlib import Path

from lit_align.errors import DataError

# Anthropic's transcripts, with an EOS after each answer. For base models.
TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def chat_template_text(setting: str) -> str:
    """The Jinja text of the setting `chat_template`.

    Args:
        setting: `transcript`, the path of a file, or the text itself (recognised by its braces).

    Raises:
        DataError: no such file.
    """
    if setting == "transcript":
        return TRANSCRIPT
    if "{{" in setting or "{%" in setting:
        return setting
    try:
        return Path(setting).read_text("utf-8")
    except OSError as error:
        raise DataError(f"chat_template: cannot read {setting}: {error.strerror}") from error
