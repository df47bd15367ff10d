"""Chat templates that a trained tokenizer can carry, in the template language of the transformers library.

The part between `generation` marks is what an assistant says: training may take the loss there alone.
"""

import re
from pathlib import Path

from torchtitan_rd.errors import ConfigError

# seal-rg/recurrent-pretraining: both names of the assistant print as Huginn; a conversation that is no
# prompt ends with end_text.
HUGINN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] in ['assistant', 'Huginn'] %}"
    "{{ '<|begin_header|>Huginn<|end_header|>\n\n' }}"
    "{% generation %}{{ message['content'] | trim }}{{ '<|end_turn|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ '<|begin_header|>' + message['role'] + '<|end_header|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|end_turn|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin_header|>Huginn<|end_header|>\n\n' }}"
    "{% else %}{{ '<|end_text|>' }}{% endif %}"
)
# OpenAI's ChatML.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"huginn": HUGINN, "chatml": CHATML}


def load_template(name: str, specials: dict[str, int]) -> str | None:
    """The template called `name`, or the text of the file of that name; None for `none`.

    specials: name -> id. Raises ConfigError if there is no such file, or if the template writes something
    like `<|name|>` that is no special token, which a model would see as plain characters.
    """
    if name == "none":
        return None
    if name in TEMPLATES:
        template = TEMPLATES[name]
    elif Path(name).is_file():
        try:
            template = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {name}: cannot be read: {error}") from None
    else:
        raise ConfigError(
            f"--chat-template {name!r}: expected {', '.join(TEMPLATES)}, none, or a file with a template"
        )
    unknown = sorted(set(re.findall(r"<\|[^|<>\s]+\|>", template)) - set(specials))
    if unknown:
        raise ConfigError(
            f"--chat-template {name}: writes {', '.join(unknown)}, which are no special tokens of this "
            "tokenizer; pin them with --special NAME=ID, or choose another --layout"
        )
    return template
