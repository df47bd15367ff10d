"""Prompts as ids, and text as it comes."""

import pytest

from tests.inference.common import loaded, prompts
from torchtitan_rd.data import load_tokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import Sampling, Settings, encode_chat, encode_prompt, generate
from torchtitan_rd.inference.text import TextRow

BYTES = load_tokenizer("bytes")


def show(text: str, *stop: str) -> tuple[list[str], TextRow]:
    row = TextRow(BYTES.decode, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(row.push(byte))
        if row.stopped:
            break
    return [piece for piece in [*pieces, row.flush()] if piece], row


def test_characters_of_several_bytes_come_whole():
    text = "a\N{GREEK SMALL LETTER ALPHA}\N{GRINNING FACE}b\N{CJK UNIFIED IDEOGRAPH-4F60}"
    pieces, row = show(text)
    assert pieces == list(text) and row.text == text


def test_half_a_character_at_the_end_is_shown_as_such():
    row = TextRow(BYTES.decode)
    assert row.push(0xE4) == "" and row.flush() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_ends_the_text_and_nothing_of_it_is_shown():
    pieces, row = show("one two\n\nthree", "\n\n", "zzz")
    assert "".join(pieces) == row.text == "one two" and row.stopped
    pieces, row = show("one tw\nthree", "\n\n", "three!")
    assert "".join(pieces) == row.text == "one tw\nthree" and not row.stopped


def test_generation_stops_each_row_at_its_stop_string_or_eos():
    model, given = loaded("llama3", BYTES, vocab_size=258), prompts(4, 9, vocab_size=256)
    free = generate(model, given, Settings(max_new_tokens=30, use_eos=False, sampling=Sampling(1.0))).rows
    stop = BYTES.decode(free[0].ids)[5]
    shown = {0: "", 1: ""}

    def note(row, text):
        shown[row] += text

    settings = Settings(max_new_tokens=30, use_eos=False, sampling=Sampling(1.0), stop=(stop,))
    found = generate(model, given, settings, on_text=note).rows
    assert found[0].ended == "stop" and found[0].text == BYTES.decode(free[0].ids).split(stop)[0]
    assert found[0].ids == free[0].ids[: len(found[0].ids)] and shown == {0: found[0].text, 1: found[1].text}
    model.source.__dict__["eos_ids"] = (free[1].ids[3],)
    (_, ended) = generate(model, given, Settings(max_new_tokens=30, sampling=Sampling(1.0))).rows
    first = free[1].ids.index(free[1].ids[3])
    assert ended.ended == "eos" and ended.ids == free[1].ids[: first + 1]


def test_a_prompt_begins_as_training_text_does():
    assert encode_prompt(BYTES, "ab") == [256, 97, 98]
    with pytest.raises(ConfigError, match="no tokenizer"):
        encode_prompt(None, "ab")


def test_a_chat_is_written_by_the_template_of_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    from torchtitan_rd.conversion.tokenizer_files import tokenizer_files

    for name, content in tokenizer_files("bytes").files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat(AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": "hi"}])
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    ids = encode_chat(AutoTokenizer.from_pretrained(tmp_path), messages)
    assert BYTES.decode(ids) == "s:s;u:hi;a:"
