import pytest

from lit_align.data.schema import SFTRow
from lit_align.data.templates import chat_template_text
from lit_align.data.tokenize import tokenize_row
from lit_align.errors import DataError
from tests.tiny_models import tiny_tokenizer


def test_transcripts_suit_a_tokenizer_without_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("transcript")
    roles = ["system", "user", "assistant", "user"]
    prompt = [{"role": role, "content": role[0]} for role in roles]
    row = SFTRow(prompt, [{"role": "assistant", "content": "end"}])
    (sequence,) = tokenize_row(row, tokenizer).sequences
    assert tokenizer.decode(sequence.prompt_ids) == (
        "<|im_start|>s\n\nHuman: u\n\nAssistant: a<|im_end|>\n\nHuman: u\n\nAssistant:"
    )
    assert tokenizer.decode(sequence.response_ids) == " end<|im_end|>"
    assert not sequence.merged_boundary


def test_a_template_is_text_or_a_file(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert chat_template_text(str(path)) == chat_template_text("{{ messages }}")
    with pytest.raises(DataError, match="cannot read absent"):
        chat_template_text("absent.jinja")
