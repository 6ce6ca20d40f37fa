"""The file of requests: what a line may say, and each mistake word for word."""

from __future__ import annotations

import json

import pytest
from launching import ROOT

from tpx.errors import RequestError
from tpx.params import SamplingParams
from tpx.requests_file import EXAMPLE, IDS, KEYS, MESSAGES, PROMPT, Line, read_requests

USER = {"role": "user", "content": "hello"}


def read(folder, *lines: object, chat: bool = False, **defaults: object) -> list[Line]:
    path = folder / "in.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts))
    return list(read_requests(str(path), defaults, chat))


def test_a_line_is_a_request(tmp_path):
    asked = {"prompt": "a", "temperature": 1, "seed": 7, "stop": "x", "logprobs": None, "n": 2}
    first, second, third = read(
        tmp_path, asked, b" ", {"prompt": [1, 2], "id": "b"}, {"messages": [USER], "id": 9},
        max_tokens=5, temperature=0.5,
    )  # fmt: skip
    params = SamplingParams(max_tokens=5, temperature=1, seed=7, stop="x", n=2)
    assert first[:5] == (1, 0, "a", None, params)
    assert second[:5] == (3, "b", [1, 2], None, SamplingParams(max_tokens=5, temperature=0.5))
    assert third[:4] == (4, 9, None, [USER])


def test_a_blank_line_counts_in_the_lines_number(tmp_path):
    lines = read(tmp_path, {"prompt": "a"}, b"", b"\t", {"prompt": "b"})
    assert [(line.number, line.id) for line in lines] == [(1, 0), (4, 3)]


def test_a_chat_is_what_a_user_says(tmp_path):
    other = [{"role": "system", "content": "short"}, USER]
    lines = read(tmp_path, {"prompt": "hello"}, {"messages": other}, chat=True)
    assert [(line.prompt, line.messages) for line in lines] == [(None, [USER]), (None, other)]


def test_the_digest_is_of_what_a_line_says_and_not_of_its_spelling(tmp_path):
    said = {"prompt": "é", "seed": 1, "id": 0}
    spelt = [b'{"prompt":"\\u00e9","seed":1}', '{ "seed": 1, "id": 0, "prompt": "é" }'.encode()]
    same = [read(tmp_path, one)[0].digest for one in (said, *spelt)]
    changes = ({"prompt": "e"}, {"seed": 2}, {"id": 1}, {"n": 1})
    others = [read(tmp_path, said | change)[0].digest for change in changes]
    assert len({*same}) == 1
    assert len({*same, *others}) == 5


def test_the_example_is_of_requests():
    lines = list(read_requests(str(ROOT / "examples" / "prompts.jsonl"), {}, False))
    assert [line.id for line in lines] == [0, "two ways on", "likely tokens", "chat"]


KEY_LIST = f"{', '.join(f'`{key}`' for key in KEYS[:-1])} or `{KEYS[-1]}`"


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (b"The", "this is not JSON: Expecting value at column 1", EXAMPLE),
        (b'{"prompt": "a"', "this is not JSON: Expecting ',' delimiter at column 15", EXAMPLE),
        (b'"a"', "this is no JSON object", EXAMPLE),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8", "save the file as UTF-8"),
        (b"[" * 200_000, "the JSON is nested too deep", EXAMPLE),
        (b'{"prompt": [' + b"1" * 5000 + b"]}", "a number has too many digits", EXAMPLE),
        (b'{"prompt": "a", "top_p": NaN}', "`NaN` is no number", None),
        (b'{"id": 1, "id": 2}', "`id` is there twice", "leave one of them out"),
        ({"prompt": "\ud83d"}, "`\\ud83d` is half a character",
         "write the character itself, in UTF-8"),
        ({"promt": "a"}, "a request has no `promt`", "did you mean `prompt`?"),
        ({"prompt": "a", "max_new_tokens": 3}, "a request has no `max_new_tokens`",
         "write `max_tokens`"),
        ({"prompt": "a", "zzz": 3}, "a request has no `zzz`", f"use {KEY_LIST}"),
        ({"prompt": "a", "id": 1.0}, "`id` is `1.0`, neither text nor a whole number", IDS),
        ({"prompt": "a", "id": True}, "`id` is `true`, neither text nor a whole number", IDS),
        ({"prompt": "a", "id": None}, "`id` is `null`, neither text nor a whole number", IDS),
        ({}, "there is neither `prompt` nor `messages`", f"{PROMPT}, or {MESSAGES}"),
        ({"prompt": "a", "messages": [USER]}, "there are both `prompt` and `messages`",
         "leave one of them out"),
        ({"prompt": None}, "`prompt` is neither text nor a list of token ids", PROMPT),
        ({"prompt": [1, "a"]}, "`prompt` is neither text nor a list of token ids", PROMPT),
        ({"prompt": [True]}, "`prompt` is neither text nor a list of token ids", PROMPT),
        ({"messages": []}, "`messages` is no list of messages, each with a `role`", MESSAGES),
        ({"messages": ["a"]}, "`messages` is no list of messages, each with a `role`", MESSAGES),
        ({"messages": [{"content": "a"}]},
         "`messages` is no list of messages, each with a `role`", MESSAGES),
        ({"prompt": "a", "temperature": -1},
         "`temperature` is `-1`, and must be a number from 0 up",
         "0 picks the likeliest token, 1 draws from the model's own distribution"),
        ({"prompt": "a", "max_tokens": "4"},
         "`max_tokens` is `'4'`, and must be a whole number from 1 up",
         "say how many tokens to write, such as `max_tokens=32`"),
    ],
)  # fmt: skip
def test_a_wrong_line(tmp_path, line, message, hint):
    with pytest.raises(RequestError) as found:
        read(tmp_path, {"prompt": "fine"}, line)
    assert found.value.message == f"`{tmp_path}/in.jsonl`, line 2: {message}"
    assert found.value.hint == hint


def test_ids_have_no_chat(tmp_path):
    with pytest.raises(RequestError) as found:
        read(tmp_path, {"prompt": [1]}, chat=True)
    said = "`prompt` has token ids, and `--chat` is for text"
    assert found.value.message == f"`{tmp_path}/in.jsonl`, line 1: {said}"
    assert found.value.hint == "give text, or leave out `--chat`"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("none.jsonl", "there is no file `{}`", "give a file: `--input FILE`"),
        (".", "`{}` is a folder, not a file of requests", EXAMPLE),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, message, hint):
    with pytest.raises(RequestError) as found:
        list(read_requests(str(tmp_path / name), {}, False))
    assert found.value.message == message.format(tmp_path / name)
    assert found.value.hint == hint
