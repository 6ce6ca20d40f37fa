"""text.py: whole characters only, stop strings across tokens, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tiny import write_tokenizer

from tpx.errors import CheckpointError, RequestError
from tpx.text import TextStream, Tokenizer, chat_template, held_back, open_tokenizer, render_chat


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte, whatever the merges."""
    vocabulary = tokenizer.tokenizer.get_vocab()
    return [vocabulary[BYTES[byte]] for byte in data]


def byte_spelling() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 stands for itself, other bytes for U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTES = byte_spelling()


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces, the last one from finish."""
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert text.text == "".join(pieces)
    return pieces


def test_text_goes_to_ids_and_back(tokenizer):
    ids = tokenizer.encode("the end é")
    assert tokenizer.decode(ids) == "the end é"
    assert tokenizer.decode([*ids, tokenizer.encode("<end>")[0]]) == "the end é"


def test_a_character_comes_once_all_its_bytes_are_there(tokenizer):
    ids = byte_tokens(tokenizer, "a€b".encode())
    assert stream(tokenizer, ids) == ["a", "", "", "€", "b", ""]


def test_a_character_that_never_became_whole_is_dropped(tokenizer):
    ids = byte_tokens(tokenizer, "ab€".encode()[:-1])
    assert stream(tokenizer, ids) == ["a", "b", "", "", ""]


def test_bytes_that_are_no_character_show_as_one_once_that_is_known(tokenizer):
    ids = byte_tokens(tokenizer, b"a\xe2\x82z")
    assert stream(tokenizer, ids) == ["a", "", "", "\ufffdz", ""]


def test_the_replacement_character_itself_is_text(tokenizer):
    ids = byte_tokens(tokenizer, "a\ufffd".encode())
    assert "".join(stream(tokenizer, ids)) == "a\ufffd"


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=["\ufffd"])))
def test_pieces_of_any_text_join_to_it_and_hold_whole_characters(tokenizer, text):
    for ids in (tokenizer.encode(text), byte_tokens(tokenizer, text.encode())):
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=12))
def test_pieces_of_any_bytes_join_to_what_they_decode_to(tokenizer, data):
    joined = "".join(stream(tokenizer, byte_tokens(tokenizer, data)))
    decoded = data.decode(errors="replace")
    assert joined in (decoded, decoded.removesuffix("\ufffd"))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcENDdef", ("END",), "abc"),
        ("abcENdef", ("END",), "abcENdef"),
        ("abcEEND", ("END",), "abcE"),
        ("ENDabc", ("END",), ""),
        ("abcEN", ("END",), "abcEN"),
        ("x€y", ("€",), "x"),
        ("one two", ("two", "one"), ""),
        ("aabaabaac", ("aabaac",), "aab"),
        ("abc", (), "abc"),
    ],
)
def test_text_ends_before_the_stop_string_wherever_tokens_end(tokenizer, text, stop, expected):
    for ids in (tokenizer.encode(text), byte_tokens(tokenizer, text.encode())):
        assert "".join(stream(tokenizer, ids, stop)) == expected


def test_what_may_begin_a_stop_string_is_held_back_and_then_given(tokenizer):
    ids = byte_tokens(tokenizer, b"aENxEN")
    assert stream(tokenizer, ids, ("END",)) == ["a", "", "", "ENx", "", "", "EN"]


def test_the_end_of_a_token_after_the_stop_string_is_cut(tokenizer):
    the_end = [*tokenizer.encode("the"), *tokenizer.encode(" the")]
    assert len(the_end) == 2
    assert stream(tokenizer, the_end, (" t",)) == ["the", "", ""]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abE", max_size=14),
    stop=st.lists(st.text("abE", min_size=1, max_size=3), max_size=3),
)
def test_streams_stop_where_the_first_stop_string_is_complete(tokenizer, text, stop):
    ends = [text.find(word) + len(word) for word in stop if word in text]
    seen = text[: min(ends)] if ends else text
    expected = seen[: min((at for at in map(seen.find, stop) if at >= 0), default=len(seen))]
    assert (
        "".join(stream(tokenizer, byte_tokens(tokenizer, text.encode()), tuple(stop))) == expected
    )


def test_held_back_is_the_longest_end_that_begins_a_stop_string():
    assert held_back("abEN", ["END", "N"]) == 2
    assert held_back("abE", ["END", "bEE"]) == 2
    assert held_back("abEND", ["END"]) == 0  # a whole one is no beginning
    assert held_back("ab", []) == 0


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert open_tokenizer(tmp_path) is None


@pytest.mark.parametrize(("content", "why"), [("{", "Expecting"), ("[]", "it names no model")])
def test_a_damaged_tokenizer_is_named(tmp_path, content, why):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        open_tokenizer(tmp_path)
    assert caught.value.message.startswith(f"`{path}` is no tokenizer: {why}")
    assert caught.value.hint == "fetch it again, or give prompts as lists of token ids"


TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m.role not in ("user", "assistant") %}{{ raise_exception("no " ~ m.role) }}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
[{{ m.role }}] {{ m.content | tojson }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}
"""


def write_template(folder: Path, in_config: bool = False) -> Path:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if in_config:
        config["chat_template"] = TEMPLATE
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("in_config", [False, True])
def test_a_chat_is_written_by_the_checkpoints_template(tmp_path, in_config):
    write_template(tmp_path, in_config)
    messages = [{"role": "user", "content": 'say "é" <b>'}]
    assert render_chat(tmp_path, messages) == '<s>[user] "say \\"é\\" <b>"\n[assistant]'
    closed = render_chat(tmp_path, messages, add_generation_prompt=False)
    assert "[assistant]" not in closed


def test_the_file_wins_over_the_config(tmp_path):
    write_template(tmp_path, in_config=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ eos_token }}{{ strftime_now('%Y') | length }}"
    )
    assert render_chat(tmp_path, []) == "</s>4"


def test_a_chat_is_encoded_without_what_the_tokenizer_adds(tmp_path):
    write_template(tmp_path)
    tokenizer = write_tokenizer(tmp_path)
    ids = tokenizer.chat([{"role": "user", "content": "the"}])
    assert tokenizer.decode(ids) == '<s>[user] "the"\n[assistant]'


def test_what_a_template_refuses_is_the_users_mistake(tmp_path):
    write_template(tmp_path)
    with pytest.raises(RequestError) as caught:
        render_chat(tmp_path, [{"role": "robot", "content": "x"}])
    assert caught.value.message == (
        f"the chat template of `{tmp_path}` refuses the messages: no robot"
    )
    assert caught.value.hint == 'write messages as `[{"role": "user", "content": "..."}]`'


def test_a_template_runs_in_a_sandbox(tmp_path):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "chat_template.jinja").write_text(escape)
    with pytest.raises(RequestError, match="refuses the messages"):
        render_chat(tmp_path, [])
    (tmp_path / "chat_template.jinja").write_text("{{ messages.append(1) }}")
    with pytest.raises(RequestError, match="refuses the messages"):
        render_chat(tmp_path, [])


def test_a_checkpoint_without_a_template_is_named(tmp_path):
    with pytest.raises(RequestError) as caught:
        chat_template(tmp_path)
    assert caught.value.message == f"`{tmp_path}` has no chat template"
    assert caught.value.hint == (
        "give raw text, or put the model's `chat_template.jinja` into the folder"
    )
