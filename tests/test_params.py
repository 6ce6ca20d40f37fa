"""params.py: what each field of SamplingParams takes, and the exact message where it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tpx import SamplingParams
from tpx.errors import RequestError, TpxError


def says(error: TpxError, message: str, hint: str | None) -> None:
    assert error.message == message
    assert error.hint == hint


TEMPERATURE = "0 picks the likeliest token, 1 draws from the model's own distribution"
WHOLE = "`{}` is `{!r}`, and must be a whole number from {} up"
STOP = 'write `stop="END"` or `stop=["END", "\\n\\n"]`'


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf, "1", None, True, 1j])
def test_temperature_out_of_range(value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=value)
    message = f"`temperature` is `{value!r}`, and must be a number from 0 up"
    says(caught.value, message, TEMPERATURE)


@pytest.mark.parametrize("value", [0, -0.5, 1.0001, math.nan, math.inf, "0.9", None, True])
def test_top_p_out_of_range(value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(top_p=value)
    message = f"`top_p` is `{value!r}`, and must be a number above 0 and at most 1"
    says(caught.value, message, "1 keeps every token")


@pytest.mark.parametrize("value", [-1, 0.5, math.nan, "5", None, True])
def test_top_k_out_of_range(value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(top_k=value)
    says(caught.value, WHOLE.format("top_k", value, 0), "0 keeps every token")


@pytest.mark.parametrize("value", [0, -1, 2.0, math.nan, "5", None, True])
def test_max_tokens_out_of_range(value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=value)
    hint = "say how many tokens to write, such as `max_tokens=32`"
    says(caught.value, WHOLE.format("max_tokens", value, 1), hint)


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, math.nan, "7", False])
def test_seed_out_of_range(value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(seed=value)
    message = f"`seed` is `{value!r}`, and must be a whole number from 0 to 2**64 - 1"
    says(caught.value, message, "leave it out for a fresh seed each time")


@pytest.mark.parametrize("value", ["", [""], [1], 5, None, b"x", ["a", None]])
def test_stop_that_is_no_text(value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(stop=value)
    message = f"`stop` is `{value!r}`, and must be a text or a list of texts, none of them empty"
    says(caught.value, message, STOP)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_ignore_eos_that_is_no_bool(value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(ignore_eos=value)
    says(caught.value, f"`ignore_eos` is `{value!r}`, and must be True or False", None)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("temprature", "did you mean `temperature`?"),
        ("max_new_tokens", "write `max_tokens`"),
        ("do_sample", "`temperature=0` is greedy, and any other temperature samples"),
        (
            "logit_bias",
            "use `temperature`, `top_p`, `top_k`, `max_tokens`, `seed`, `stop`, `ignore_eos`, "
            "`logprobs` or `n`",
        ),
    ],
)
def test_an_unknown_keyword_of_sampling_params(word, hint):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{word: 1})
    says(caught.value, f"`SamplingParams` knows no `{word}`", hint)


def test_numbers_of_numpy_and_a_single_stop_string_are_taken():
    params = SamplingParams(np.float32(0.5), np.float64(1), np.int64(3), np.int32(4), np.uint64(5))
    assert params == SamplingParams(0.5, 1.0, 3, 4, 5)
    assert SamplingParams(stop="x").stop == SamplingParams(stop=["x"]).stop == ("x",)
    assert SamplingParams(seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(AttributeError):
        params.top_k = 4


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        (
            {"logprobs": -1},
            "`logprobs` is `-1`, and must be a whole number from 0 up",
            "0 reports the token drawn alone, None nothing",
        ),
        (
            {"n": 0},
            "`n` is `0`, and must be a whole number from 1 up",
            "say how many continuations to write",
        ),
    ],
)
def test_logprobs_and_n_out_of_range(given, message, hint):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    says(caught.value, message, hint)
